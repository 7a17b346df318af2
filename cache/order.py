"""The order of windows in an epoch: a pure function of (seed, epoch), in memory that does not grow with the data.

Blocks of consecutive windows are permuted; each group of consecutive permuted blocks is a shuffle buffer whose windows
are permuted again (docs/format.md, section 10). Only one permutation of blocks is held.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCKS_PER_GROUP = 64


@dataclass(frozen=True, slots=True)
class Group:
    """One shuffle buffer: which blocks it reads and in which order their windows come."""

    blocks: np.ndarray
    windows: np.ndarray


class WindowOrder:
    """All windows of a split, each exactly once, in the order of one epoch. `seed=None` is the stored order."""

    def __init__(self, num_windows: int, windows_per_block: int, seed: int | None, epoch: int = 0) -> None:
        self.num_windows = num_windows
        self._windows_per_block = windows_per_block
        self._seed = seed
        self._epoch = epoch
        num_blocks = -(-num_windows // windows_per_block)
        self._blocks = np.arange(num_blocks) if seed is None else self._generator().permutation(num_blocks)

    def groups(self, first_position: int = 0) -> Iterator[tuple[int, Group]]:
        """Groups from the one that holds `first_position` of the epoch on, each with its own first position."""
        position = 0
        for number, start in enumerate(range(0, len(self._blocks), BLOCKS_PER_GROUP)):
            blocks = self._blocks[start : start + BLOCKS_PER_GROUP]
            ends = np.minimum((blocks + 1) * self._windows_per_block, self.num_windows)
            size = int((ends - blocks * self._windows_per_block).sum())
            if position + size > first_position:
                yield position, Group(blocks, self._windows_of(number, blocks, ends))
            position += size

    def windows(self, first_position: int = 0) -> Iterator[int]:
        """Window numbers from `first_position` of the epoch on."""
        for position, group in self.groups(first_position):
            yield from group.windows[max(0, first_position - position) :].tolist()

    def _windows_of(self, number: int, blocks: np.ndarray, ends: np.ndarray) -> np.ndarray:
        starts = blocks * self._windows_per_block
        windows = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        return windows if self._seed is None else self._generator(number).permutation(windows)

    def _generator(self, *group: int) -> np.random.Generator:
        sequence = np.random.SeedSequence(self._seed, spawn_key=(self._epoch, *group))
        return np.random.Generator(np.random.Philox(sequence))
