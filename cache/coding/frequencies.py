"""Static models: how often each token is expected in each context, in units of 1 / 4096.

Shapes: C contexts, S tokens.
"""

import numpy as np

from tristill.cache.errors import CacheCorruptError

PROBABILITY_BITS = 12
TOTAL = 1 << PROBABILITY_BITS
_LARGEST_NUM_TOKENS = 256


def frequencies_from_counts(counts_CS: np.ndarray) -> np.ndarray:
    """(C, S) uint16, rows summing to 4096, every token at least 1: proportional to the counts as far as that goes.

    What rounding leaves over goes to, or is taken from, the most frequent token. A context without any count takes the
    sum of all contexts.
    """
    counts_CS = counts_CS.astype(np.float64)
    empty_C = counts_CS.sum(axis=1) == 0
    counts_CS = np.where(empty_C[:, None], counts_CS.sum(axis=0) + 1e-9, counts_CS)
    room = TOTAL - counts_CS.shape[1]
    frequencies_CS: np.ndarray = 1 + np.floor(counts_CS / counts_CS.sum(axis=1, keepdims=True) * room).astype(np.int64)
    rows = np.arange(len(frequencies_CS))
    frequencies_CS[rows, frequencies_CS.argmax(axis=1)] += TOTAL - frequencies_CS.sum(axis=1)
    rounded_CS: np.ndarray = frequencies_CS.astype(np.uint16)
    return rounded_CS


class Model:
    """Frequencies with the tables that coding needs. Raises CacheCorruptError for frequencies that code nothing."""

    def __init__(self, frequencies_CS: np.ndarray) -> None:
        frequencies_CS = frequencies_CS.astype(np.int64)
        num_contexts, num_tokens = frequencies_CS.shape
        if (
            not 2 <= num_tokens <= _LARGEST_NUM_TOKENS
            or (frequencies_CS < 1).any()
            or (frequencies_CS.sum(axis=1) != TOTAL).any()
        ):
            raise CacheCorruptError(
                f"a table of frequencies {frequencies_CS.shape} is damaged: expected rows of 2 to "
                f"{_LARGEST_NUM_TOKENS} numbers, each at least 1, that sum to {TOTAL}"
            )
        self.num_contexts = num_contexts
        self.num_tokens = num_tokens
        starts_CS = np.cumsum(frequencies_CS, axis=1) - frequencies_CS
        self.frequencies = frequencies_CS.astype(np.uint32).ravel()
        self.starts = starts_CS.astype(np.uint32).ravel()
        # Per context and slot, in one word: token << 24 | frequency << 12 | slot - start.
        repeats = frequencies_CS.ravel()
        tokens = np.tile(np.arange(num_tokens, dtype=np.uint32), num_contexts)
        entries = (tokens << np.uint32(24)) | (self.frequencies << np.uint32(PROBABILITY_BITS))
        self.slots = np.repeat(entries - self.starts, repeats)
        self.slots += np.tile(np.arange(TOTAL, dtype=np.uint32), num_contexts)

    def bits(self, tokens: np.ndarray, contexts: np.ndarray) -> float:
        """What coding these tokens costs, raw bits not counted."""
        used = self.frequencies[contexts * self.num_tokens + tokens]
        return float((PROBABILITY_BITS - np.log2(used)).sum())
