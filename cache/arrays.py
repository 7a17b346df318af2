"""What a dataset of a shard looks like: name, shape of one window, little-endian type."""

import math
from dataclasses import dataclass

import numpy as np

from cache.errors import CacheRequestError

LARGEST_VOCAB_SIZE = 2**32


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One dataset: `window_shape` is its shape without the leading dimension of windows."""

    name: str
    window_shape: tuple[int, ...]
    dtype: str

    @property
    def window_bytes(self) -> int:
        """Bytes of one window before compression."""
        return math.prod(self.window_shape) * np.dtype(self.dtype).itemsize


def ids_dtype(vocab_size: int) -> str:
    """The smallest little-endian unsigned type that holds every id below `vocab_size`."""
    if vocab_size <= 2**16:
        return "<u2"
    if vocab_size <= LARGEST_VOCAB_SIZE:
        return "<u4"
    raise CacheRequestError(
        f"the vocabulary has {vocab_size} entries, but ids are stored in at most 32 bits ({LARGEST_VOCAB_SIZE} "
        "entries); use a tokenizer with a smaller vocabulary"
    )
