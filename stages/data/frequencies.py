"""How often each token occurs."""

from pathlib import Path

import numpy as np

from tristill.cache.regular_file import require_regular
from tristill.stages.data.tokenized import load_corpus
from tristill.stages.errors import CorpusError

MAX_TOKENS = 4_000_000


def token_counts(folder: Path, max_tokens: int = MAX_TOKENS) -> list[int]:
    """Occurrences of the ids that occur among the first `max_tokens` of the train split, from the most frequent down.

    Raises CorpusError if the folder cannot be read.
    """
    corpus = load_corpus(folder)
    try:
        require_regular(folder / "train.npy")
        tokens = np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        raise CorpusError(f"{folder / 'train.npy'}: cannot be read as token ids ({exc})") from exc
    counts = np.bincount(tokens[:max_tokens], minlength=corpus.vocab_size)
    found: list[int] = np.sort(counts[counts > 0])[::-1].tolist()
    return found
