"""Epoch after epoch a cache of many shards is streamed in the right order, and memory does not grow."""

from pathlib import Path

import pytest

from benchmarks.soak import EpochSeen, streamed, synthetic_cache
from tristill.stages.resources import keep_freed_memory


def check(epochs: list[EpochSeen]) -> None:
    assert all(epoch.is_in_order for epoch in epochs)
    assert max(epoch.peak_rss_mib for epoch in epochs[1:]) < 1.05 * epochs[0].peak_rss_mib


@pytest.mark.alone
def test_seventy_shards_are_streamed_in_order_in_memory_that_does_not_grow(tmp_path: Path) -> None:
    keep_freed_memory()
    cache = synthetic_cache(tmp_path / "cache", 70 * 8192, shard_positions=8192)
    assert len(cache.manifest.shards) == 70, "more than one run"
    check([streamed(cache, epoch) for epoch in range(3)])


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("positions", [20_000_000])
def test_twenty_million_positions_are_streamed_in_order_at_a_constant_speed(tmp_path: Path, positions: int) -> None:
    keep_freed_memory()
    cache = synthetic_cache(tmp_path / "cache", positions)
    epochs = [streamed(cache, epoch) for epoch in range(4)]
    check(epochs)
    speeds = [epoch.positions_per_s for epoch in epochs]
    assert min(speeds) > 0.8 * max(speeds), speeds
