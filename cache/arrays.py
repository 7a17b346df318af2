"""What an array of a cache looks like: name, shape of one window, little-endian type."""

import math
from dataclasses import dataclass

import numpy as np
import zstandard

from tristill.cache.errors import CacheRequestError

LARGEST_VOCAB_SIZE = 2**32


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array: `shape` is that of one window; of a table or a coded chunk, its whole shape."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes before compression."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Dataset:
    """One dataset of a shard: an array of every window, or the coded bytes of every chunk."""

    array: ArraySpec
    per_chunk: bool = False

    @property
    def name(self) -> str:
        """Its name in the shard."""
        return self.array.name


def compressed_bytes(array: np.ndarray) -> int:
    """Bytes of a Zstandard frame of it, at level 3: what it takes on disk, about."""
    return len(zstandard.ZstdCompressor(3).compress(np.ascontiguousarray(array).tobytes()))


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
