"""A small corpus of windows from all over a large one, in the form in which every step finds it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tristill.cache.atomic import write_atomically
from tristill.cache.hashing import sha256_of_file
from tristill.cache.layout import TOKENIZER_NAME, default_windows_per_chunk
from tristill.cache.spec import SplitName
from tristill.stages.data.tokenized import MaskedTokens, TokenizedCorpus, TokenizedSplit, load_corpus, mask_name
from tristill.stages.data.tokens import token_file
from tristill.stages.models.companions import write_tokenizer


def sample_corpus(
    data_folder: Path, folder: Path, num_windows: Mapping[SplitName, int], out_of: Mapping[SplitName, int]
) -> TokenizedCorpus:
    """Write `folder` with about so many windows per split, spread evenly over the first `out_of` of the corpus.

    They come in runs of as many as make up a chunk of a cache, so that what is coded together there is so here; where
    two runs meet, the last label of the first is wrong. Which tokens count is cut alike. A split of no more windows is
    taken whole, by links.
    """
    corpus = load_corpus(data_folder)
    size = corpus.context_length
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, wanted in num_windows.items():
        whole = corpus.splits[split]
        names = [f"{split}.npy", *([mask_name(split)] if corpus.is_masked else [])]
        every = (whole.tokens - 1) // size
        total = min(every, out_of[split])
        if wanted >= every and total == every:
            for name in names:
                (folder / name).symlink_to((data_folder / name).resolve())
            splits[split] = whole
            continue
        run = total if wanted >= total else min(default_windows_per_chunk(size), wanted)
        num_runs = 1 if wanted >= total else -(-wanted // run)
        starts = np.linspace(0, total - run, num_runs).astype(int)
        runs = [slice(start * size, (start + run) * size) for start in starts]
        runs.append(slice(runs[-1].stop, runs[-1].stop + 1))
        for name in names:
            _cut(data_folder / name, folder / name, runs)
        splits[split] = _described(whole, folder, names)
    write_tokenizer(data_folder / TOKENIZER_NAME, folder)
    sample = corpus.model_copy(update={"splits": splits})
    write_atomically(folder / "data.json", (sample.model_dump_json(indent=2) + "\n").encode())
    return sample


def _cut(original: Path, to: Path, runs: Sequence[slice]) -> None:
    values = np.load(original, mmap_mode="r", allow_pickle=False)
    with token_file(to, values.dtype.str) as file:
        for run in runs:
            file.append(values[run])


def _described(whole: TokenizedSplit, folder: Path, names: Sequence[str]) -> TokenizedSplit:
    """The split of what was cut, with as many bytes to a token that counts as the whole has."""
    tokens, *mask = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in names)
    hashes = [sha256_of_file(folder / name) for name in names]
    counted = MaskedTokens(tokens=int(np.count_nonzero(mask[0])), sha256=hashes[1]) if mask else None
    num_counted = len(tokens) if counted is None else counted.tokens
    text_bytes = round(whole.bytes_per_token * num_counted)
    changes = {"tokens": len(tokens), "text_bytes": text_bytes, "sha256": hashes[0], "counted": counted}
    return whole.model_copy(update=changes)
