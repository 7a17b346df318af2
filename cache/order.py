"""The order of windows in an epoch: a pure function of (seed, epoch), in memory that grows with shards, not windows.

Shards are permuted, and each 64 consecutive permuted shards are a run; blocks of consecutive windows are permuted
within their run; each group of 64 consecutive permuted blocks is a shuffle buffer whose windows are permuted again
(docs/format.md, section 10). Held are a permutation of shards, and one run's permutation of blocks.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

SHARDS_PER_RUN = 64
BLOCKS_PER_GROUP = 64


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


@dataclass(frozen=True, slots=True)
class Deal:
    """Which windows of each global batch of `batch_windows` one of `world_size` ranks takes: an equal share.

    The windows of a batch are sorted by number, and rank r takes the r-th share of them, in the order of the batch: so
    a rank reads few of a run's shards. Of a short batch, shares differ by one window at most.
    """

    batch_windows: int
    rank: int = 0
    world_size: int = 1

    def taken(self, batches_MB: np.ndarray) -> np.ndarray:
        """The rank's windows of M batches of one size, (M, share)."""
        if self.world_size == 1:
            return batches_MB
        size = batches_MB.shape[1]
        share = slice(size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size)
        places = np.sort(np.argsort(batches_MB, axis=1)[:, share], axis=1)
        return np.take_along_axis(batches_MB, places, axis=1)


class WindowOrder:
    """All windows of a split, each exactly once, in the order of one epoch. `seed=None` is the stored order.

    With a pacing, only those that are seen; positions count them.
    """

    def __init__(
        self,
        num_windows: int,
        windows_per_block: int,
        windows_per_shard: int,
        seed: int | None,
        epoch: int = 0,
        pacing: Pacing | None = None,
    ) -> None:
        """A shard holds whole blocks, and so many windows; the last one of the split may hold fewer."""
        self._all_windows = num_windows
        self._pacing = pacing
        self._windows_per_block = windows_per_block
        self._windows_per_shard = windows_per_shard
        self._seed = seed
        self._epoch = epoch
        self._num_shards = -(-num_windows // windows_per_shard)
        self._shards = np.arange(self._num_shards)
        if self._has_many_runs:
            self._shards = self._permuted(self._shards)

    @property
    def num_windows(self) -> int:
        """Windows of the epoch."""
        if self._pacing is None:
            return self._all_windows
        return sum(len(group.windows) for _, group in self.groups())

    def groups(self, first_position: int = 0) -> Iterator[tuple[int, Group]]:
        """Groups from the one that holds `first_position` of the epoch on, each with its own first position."""
        position = 0
        for run, first in enumerate(range(0, self._num_shards, SHARDS_PER_RUN)):
            shards = self._shards[first : first + SHARDS_PER_RUN]
            size = self._count(shards, self._windows_per_shard)
            if self._pacing is None and position + size <= first_position:
                position += size
                continue
            key = (run,) if self._has_many_runs else ()
            blocks_in_run = self._permuted(self._blocks_of(shards), *key)
            for number, start in enumerate(range(0, len(blocks_in_run), BLOCKS_PER_GROUP)):
                blocks = blocks_in_run[start : start + BLOCKS_PER_GROUP]
                size = self._count(blocks, self._windows_per_block)
                if self._pacing is None and position + size <= first_position:
                    position += size
                    continue
                stored = self._members(blocks, self._windows_per_block, self._all_windows)
                windows = self._permuted(stored, *key, number)
                if self._pacing is not None:
                    windows = self._pacing.seen(windows, position)
                    blocks = np.unique(windows // self._windows_per_block)
                if position + len(windows) > first_position:
                    yield position, Group(blocks, windows)
                position += len(windows)

    def windows(self, first_position: int = 0) -> Iterator[int]:
        """Window numbers from `first_position` of the epoch on."""
        for windows in self._windows_of_groups(first_position):
            yield from windows.tolist()

    def batches(self, deal: Deal, first_batch: int = 0, *, drop_last: bool = True) -> Iterator[np.ndarray]:
        """What a rank takes of the batches from `first_batch` on: windows (M, share), M batches at a time.

        They come as soon as a group of the order completes them; with `drop_last=False` a last one may be short.
        """
        rest = np.zeros(0, np.int64)
        for windows in self._windows_of_groups(first_batch * deal.batch_windows):
            rest = np.concatenate([rest, windows])
            whole = len(rest) // deal.batch_windows * deal.batch_windows
            if whole:
                yield deal.taken(rest[:whole].reshape(-1, deal.batch_windows))
                rest = rest[whole:]
        if len(rest) and not drop_last:
            yield deal.taken(rest[None])

    def _windows_of_groups(self, first_position: int) -> Iterator[np.ndarray]:
        for position, group in self.groups(first_position):
            yield group.windows[max(0, first_position - position) :]

    @property
    def _has_many_runs(self) -> bool:
        return self._num_shards > SHARDS_PER_RUN

    def _blocks_of(self, shards: np.ndarray) -> np.ndarray:
        num_blocks = -(-self._all_windows // self._windows_per_block)
        return self._members(np.sort(shards), self._windows_per_shard // self._windows_per_block, num_blocks)

    def _count(self, containers: np.ndarray, each: int) -> int:
        """Windows in blocks or shards that hold so many each; only the last of the split may hold fewer."""
        missing = (int(containers.max(initial=0)) + 1) * each - self._all_windows
        return len(containers) * each - max(0, missing)

    @staticmethod
    def _members(containers: np.ndarray, each: int, total: int) -> np.ndarray:
        """Windows of blocks, or blocks of shards: those of each container in their order."""
        members = (containers[:, None] * each + np.arange(each)).ravel()
        return members[members < total]

    def _permuted(self, values: np.ndarray, *key: int) -> np.ndarray:
        if self._seed is None:
            return values
        sequence = np.random.SeedSequence(self._seed, spawn_key=(self._epoch, *key))
        return np.random.Generator(np.random.Philox(sequence)).permutation(values)
