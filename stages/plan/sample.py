"""A small corpus of windows from all over a large one, in the form in which every step finds it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cache.atomic import write_atomically
from cache.hashing import sha256_of_file
from cache.layout import TOKENIZER_NAME, default_windows_per_chunk
from cache.spec import SplitName
from stages.data.tokenized import TokenizedCorpus, load_corpus
from stages.data.tokens import token_file


def sample_corpus(
    data_folder: Path, folder: Path, num_windows: Mapping[SplitName, int], out_of: Mapping[SplitName, int]
) -> TokenizedCorpus:
    """Write `folder` with about so many windows per split, spread evenly over the first `out_of` of the corpus.

    They come in runs of as many as make up a chunk of a cache, so that what is coded together there is so here; where
    two runs meet, the last label of the first is wrong. A split of no more windows is taken whole, by a link.
    """
    corpus = load_corpus(data_folder)
    size = corpus.context_length
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, wanted in num_windows.items():
        path, whole = data_folder / f"{split}.npy", corpus.splits[split]
        every = (whole.tokens - 1) // size
        total = min(every, out_of[split])
        if wanted >= every and total == every:
            (folder / path.name).symlink_to(path.resolve())
            splits[split] = whole
            continue
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        run = total if wanted >= total else min(default_windows_per_chunk(size), wanted)
        num_runs = 1 if wanted >= total else -(-wanted // run)
        with token_file(folder / path.name, tokens.dtype.str) as file:
            for start in np.linspace(0, total - run, num_runs).astype(int):
                file.append(tokens[start * size : (start + run) * size].tolist())
            file.append(tokens[(start + run) * size :][:1].tolist())
        share = file.num_tokens / whole.tokens
        counted = {"tokens": file.num_tokens, "text_bytes": round(whole.text_bytes * share)}
        splits[split] = whole.model_copy(update={**counted, "sha256": sha256_of_file(folder / path.name)})
    write_atomically(folder / TOKENIZER_NAME, (data_folder / TOKENIZER_NAME).read_bytes())
    sample = corpus.model_copy(update={"splits": splits})
    write_atomically(folder / "data.json", (sample.model_dump_json(indent=2) + "\n").encode())
    return sample
