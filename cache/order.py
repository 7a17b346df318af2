"""The order of windows in an epoch: a pure function of (seed, epoch), in memory that does not grow with the data.

Blocks of consecutive windows are permuted; each group of consecutive permuted blocks is a shuffle buffer whose windows
are permuted again (docs/format.md, section 10). Only one permutation of blocks is held.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BLOCKS_PER_GROUP = 64


def share_of(windows: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The windows of a batch that a rank takes: all, as they are, if it is alone; else the rank-th part of all, sorted.

    Parts are of one size, but for those of a batch that cannot be cut so, of which the last ones may be empty.
    """
    if world_size == 1:
        return list(windows)
    size = -(-len(windows) // world_size)
    return sorted(windows)[rank * size : (rank + 1) * size]


@dataclass(frozen=True, slots=True)
class Group:
    """One shuffle buffer: which blocks it reads and in which order their windows come."""

    blocks: np.ndarray
    windows: np.ndarray


@dataclass(frozen=True, slots=True)
class Pacing:
    """Which windows of an order are seen: in the n-th batch of a training, those of rank below share(n) * all.

    rank_W: a permutation, 0 for the window that is seen first. batches_before: of earlier epochs.
    """

    rank_W: np.ndarray
    share: Callable[[int], float]
    batch_windows: int
    batches_before: int = 0

    def seen(self, windows: np.ndarray, position: int) -> np.ndarray:
        """Of windows in their order, those that are seen, if so many of the epoch were seen before."""
        ranks = self.rank_W[windows]
        kept = []
        while len(windows):
            batch, filled = divmod(position, self.batch_windows)
            allowed = max(self.batch_windows, math.ceil(self.share(self.batches_before + batch) * len(self.rank_W)))
            places = np.flatnonzero(ranks < allowed)[: self.batch_windows - filled]
            kept.append(windows[places])
            position += len(places)
            rest = places[-1] + 1 if len(places) == self.batch_windows - filled else len(windows)
            windows, ranks = windows[rest:], ranks[rest:]
        return np.concatenate(kept) if kept else windows


class WindowOrder:
    """All windows of a split, each exactly once, in the order of one epoch. `seed=None` is the stored order.

    With a pacing, only those that are seen; positions count them.
    """

    def __init__(
        self,
        num_windows: int,
        windows_per_block: int,
        seed: int | None,
        epoch: int = 0,
        pacing: Pacing | None = None,
    ) -> None:
        self._all_windows = num_windows
        self._pacing = pacing
        self._windows_per_block = windows_per_block
        self._seed = seed
        self._epoch = epoch
        num_blocks = -(-num_windows // windows_per_block)
        self._blocks = np.arange(num_blocks) if seed is None else self._generator().permutation(num_blocks)

    @property
    def num_windows(self) -> int:
        """Windows of the epoch."""
        if self._pacing is None:
            return self._all_windows
        return sum(len(group.windows) for _, group in self.groups())

    def groups(self, first_position: int = 0) -> Iterator[tuple[int, Group]]:
        """Groups from the one that holds `first_position` of the epoch on, each with its own first position."""
        position = 0
        for number, start in enumerate(range(0, len(self._blocks), BLOCKS_PER_GROUP)):
            blocks = self._blocks[start : start + BLOCKS_PER_GROUP]
            ends = np.minimum((blocks + 1) * self._windows_per_block, self._all_windows)
            if self._pacing is not None:
                windows = self._pacing.seen(self._windows_of(number, blocks, ends), position)
                if position + len(windows) > first_position:
                    yield position, Group(np.unique(windows // self._windows_per_block), windows)
                position += len(windows)
                continue
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
