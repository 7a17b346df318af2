"""Dither of the transform profile: uniform numbers that writer and reader both know.

Subtractive dither (Schuchman 1964; Gray and Stockham 1993, IEEE Trans. Inf. Theory 39(3), theorem 1): the writer adds u
before rounding, the reader subtracts it, and the error is uniform and independent of what was rounded.
"""

import hashlib
from functools import cache

import numpy as np

LEVELS = 256
_LARGEST = 2048


def dither_bytes(seed: int, split: str, first_window: int, num_windows: int, per_window: int) -> np.ndarray:
    """(num_windows, per_window) uint8, a pure function of seed, split and window: see dither_of."""
    rows = np.empty((num_windows, per_window), np.uint8)
    name = int.from_bytes(hashlib.sha256(split.encode()).digest()[:4], "little")
    for row in range(num_windows):
        stream = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(name, first_window + row)))
        words = stream.random_raw(-(-per_window // 8)).astype("<u8", copy=False)  # as Generator.bytes, in half the time
        rows[row] = words.view(np.uint8)[:per_window]
    return rows


def dither_of(levels: np.ndarray) -> np.ndarray:
    """Levels as numbers u in (-1/2, 1/2), float32: (level + 1/2) / 256 - 1/2."""
    return ((levels.astype(np.float32) + np.float32(0.5)) / np.float32(LEVELS)) - np.float32(0.5)


def undithered(rounded: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """rounded - dither_of(levels), float16, for int16 |rounded| < 2048.

    Twice the levels' denominator times it is an odd integer: numpy finds its float16 in a table faster than it rounds.
    """
    places = np.multiply(rounded, 2 * LEVELS, dtype=np.int32)
    places -= np.left_shift(levels, 1, dtype=np.int16)
    places += 2 * LEVELS * _LARGEST + LEVELS - 1
    found: np.ndarray = _float16_table().take(places)
    return found


@cache
def _float16_table() -> np.ndarray:
    numerators = np.arange(-2 * LEVELS * _LARGEST, 2 * LEVELS * _LARGEST, dtype=np.float32)
    return (numerators / np.float32(2 * LEVELS)).astype("<f2")
