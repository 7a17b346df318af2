"""The order of windows is a pure function of (seed, epoch), whoever reads it and wherever one starts."""

import hashlib
import math
import tracemalloc
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_spec, window_arrays, write_cache
from tristill.cache import Cache, open_cache
from tristill.cache.order import BLOCKS_PER_GROUP, SHARDS_PER_RUN, Deal, Pacing, WindowOrder


@st.composite
def orders(draw: st.DrawFn) -> WindowOrder:
    """Of few and of many shards, the last one whole or not, with and without a pacing."""
    per_block = draw(st.integers(1, 6))
    per_shard = per_block * draw(st.integers(1, 5))
    num_windows = draw(st.integers(1, 200 * per_shard))
    pacing = None
    if draw(st.booleans()):
        rank = np.random.default_rng(draw(st.integers(0, 9))).permutation(num_windows)
        pacing = Pacing(
            rank, lambda batch: min(1.0, 0.1 + batch / 9), draw(st.integers(1, 50)), draw(st.integers(0, 5))
        )
    seed = draw(st.one_of(st.none(), st.integers(0, 2**40)))
    return WindowOrder(num_windows, per_block, per_shard, seed, draw(st.integers(0, 3)), pacing)


def batches_of(order: WindowOrder, deal: Deal, first_batch: int = 0, *, drop_last: bool = False) -> list[list[int]]:
    parts = order.batches(deal, first_batch, drop_last=drop_last)
    return list(chain.from_iterable(part.tolist() for part in parts))


@settings(deadline=None)
@given(orders())
def test_every_window_comes_exactly_once(order: WindowOrder) -> None:
    windows = list(order.windows())
    assert len(windows) == order.num_windows
    if order._pacing is None:
        assert sorted(windows) == list(range(order._all_windows))
    else:
        assert len(set(windows)) == len(windows)
    assert windows == list(order.windows())


@settings(deadline=None)
@given(orders(), st.data())
def test_starting_in_the_middle_gives_the_rest(order: WindowOrder, data: st.DataObject) -> None:
    whole = list(order.windows())
    first = data.draw(st.integers(0, len(whole)))
    assert list(order.windows(first)) == whole[first:]


@settings(deadline=None)
@given(orders(), st.integers(1, 12), st.integers(1, 9), st.data())
def test_ranks_take_equal_shares_of_every_batch_and_all_of_it(
    order: WindowOrder, share: int, world_size: int, data: st.DataObject
) -> None:
    size = share * world_size
    alone = batches_of(order, Deal(size))
    windows = list(order.windows())
    assert alone == [windows[first : first + size] for first in range(0, len(windows), size)]
    first_batch = data.draw(st.integers(0, len(alone)))
    per_rank = [batches_of(order, Deal(size, rank, world_size), first_batch) for rank in range(world_size)]
    for number, batch in enumerate(alone[first_batch:]):
        places = {window: place for place, window in enumerate(batch)}
        parts = [batches[number] for batches in per_rank]
        assert [sorted(part) for part in parts] == [
            sorted(batch)[len(batch) * r // world_size : len(batch) * (r + 1) // world_size] for r in range(world_size)
        ]
        assert all(part == sorted(part, key=places.__getitem__) for part in parts)
    whole = [batch for batch in alone if len(batch) == size]
    for rank in range(world_size):
        kept = batches_of(order, Deal(size, rank, world_size), first_batch, drop_last=True)
        assert kept == per_rank[rank][: max(0, len(whole) - first_batch)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(65, 300), st.integers(0, 9), st.integers(0, 3))
def test_a_run_reads_64_shards_and_a_group_64_blocks(
    per_block: int, blocks_per_shard: int, num_shards: int, seed: int, short: int
) -> None:
    per_shard = per_block * blocks_per_shard
    num_windows = num_shards * per_shard - min(short, per_shard - 1)
    groups = [group for _, group in WindowOrder(num_windows, per_block, per_shard, seed).groups()]
    shards: list[int] = []
    for group in groups:
        assert sorted(set((group.windows // per_block).tolist())) == sorted(group.blocks.tolist())
        assert len(group.blocks) <= BLOCKS_PER_GROUP
        shards.extend(dict.fromkeys((group.blocks // blocks_per_shard).tolist()))
    runs = list(dict.fromkeys(shards))
    for run in range(math.ceil(num_shards / SHARDS_PER_RUN)):
        of_run = runs[run * SHARDS_PER_RUN : (run + 1) * SHARDS_PER_RUN]
        places = [place for place, shard in enumerate(shards) if shard in set(of_run)]
        assert places == list(range(places[0], places[-1] + 1)), (
            "shards of a run are read before all others, and done with"
        )


def sha256_of(windows: Sequence[int]) -> str:
    return hashlib.sha256(np.array(windows, "<i8").tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("num_windows", "per_block", "seed", "epoch", "expected"),
    [
        (10, 2, 7, 3, "f0d3b7ce8737992b9d6053c2a29383f40d1122ff21d99637438bcbf8a357a516"),
        (1000, 3, 1, 0, "d6cc5ea9279e3f6ed2279cbed2e9bbcc814bbfea5a6aaa73b01e0a71f3d6c0a1"),
        (20000, 4, 5, 2, "c4fb495109545f9420d8c17f4dc841cafcf533441cb856332566956e08bc13f9"),
        (200, 7, 2**40, 9, "42021068b3a76414cf05fddd3de155762a9d4cd232f42a02d177501459254ba0"),
    ],
)
@pytest.mark.parametrize("num_shards", [1, 2, 64])
def test_of_at_most_64_shards_the_order_is_as_it_has_always_been(
    num_windows: int, per_block: int, seed: int, epoch: int, expected: str, num_shards: int
) -> None:
    """From before there were runs."""
    blocks_per_shard = math.ceil(num_windows / per_block / num_shards)
    order = WindowOrder(num_windows, per_block, blocks_per_shard * per_block, seed, epoch)
    assert sha256_of(list(order.windows())) == expected


def test_of_more_shards_the_order_is_as_it_was_first() -> None:
    assert list(WindowOrder(10, 2, 4, seed=7, epoch=3).windows()) == [8, 0, 6, 3, 5, 4, 2, 9, 1, 7]
    windows = list(WindowOrder(5000, 3, 6, seed=7, epoch=3).windows())
    assert sha256_of(windows) == "5ce13eeb0a8efa37335543145dcb80c8a5fa5431edd3cd647cd1b98da62ecb21"


@pytest.mark.parametrize("per_shard", [1, 4, 100, 20_000])
def test_epochs_and_seeds_are_unrelated(per_shard: int) -> None:
    """Places of 20,000 windows in two orders: by chance the correlation is 1 / sqrt(20,000) = 0.007 or so, of blocks of
    4 windows twice that."""
    per_block = min(4, per_shard)
    orders = [
        np.array(list(WindowOrder(20_000, per_block, per_shard, seed, epoch).windows()))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    places = [np.argsort(order) for order in orders]
    bound = 4 * math.sqrt(max(per_block, per_shard if 20_000 / per_shard > SHARDS_PER_RUN else 1) / 20_000)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(places[a], places[b])[0, 1]) < bound
    for own in places:
        assert abs(np.corrcoef(own, np.arange(20_000))[0, 1]) < bound


def test_of_ten_million_blocks_little_is_held() -> None:
    """10,000 shards of 1,024 blocks: one integer per shard and per block of a run, and no more."""
    tracemalloc.start()
    order = WindowOrder(10_000 * 1024 * 32, 32, 1024 * 32, seed=0)
    windows = order.windows(200_000_000)
    first = [next(windows) for _ in range(10_000)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(first)) == len(first)
    assert peak < 4 * 2**20


def test_ranks_read_few_of_a_runs_shards() -> None:
    """640 shards of 16 blocks of 32 windows, batches of 8 windows a rank: each rank of 64 reads a quarter of them.

    Dealt in the order of the batch, every rank would read nearly every shard.
    """
    order = WindowOrder(640 * 512, 32, 512, seed=0)
    mine = {
        (rank, window // 512)
        for rank in range(0, 64, 9)
        for part in order.batches(Deal(512, rank, 64))
        for window in part.ravel().tolist()
    }
    assert len(mine) / 8 / 640 < 0.25


def ids_of(batches: list) -> list[bytes]:  # type: ignore[type-arg]
    return [row.tobytes() for batch in batches for row in batch.input_ids]


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shuffle buffers and runs even in a small cache."""
    monkeypatch.setattr("tristill.cache.order.BLOCKS_PER_GROUP", 2)
    monkeypatch.setattr("tristill.cache.order.SHARDS_PER_RUN", 2)


@pytest.mark.usefixtures("small_runs")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_stream_gives_the_order_at_any_world_size_and_thread_count(
    small_cache: Cache, world_size: int, threads: int
) -> None:
    order = WindowOrder(70, 4, 16, seed=5, epoch=2)
    for rank in range(world_size):
        found = list(small_cache.stream("train", 8, seed=5, epoch=2, rank=rank, world_size=world_size, threads=threads))
        expected = batches_of(order, Deal(8, rank, world_size), drop_last=True)
        assert len(found) == 70 // 8
        for batch, windows in zip(found, expected, strict=True):
            wanted = [window_arrays(small_cache.spec, "train", range(window, window + 1)) for window in windows]
            for name, array in {"input_ids": batch.input_ids, **batch.target}.items():
                assert np.array_equal(array, np.concatenate([arrays[name] for arrays in wanted]))


@pytest.mark.usefixtures("small_runs")
def test_stream_resumes_in_the_middle_of_an_epoch_at_another_world_size(small_cache: Cache) -> None:
    whole = list(small_cache.stream("train", 8, seed=1, epoch=4))
    for first in range(len(whole) + 1):
        rest = list(small_cache.stream("train", 8, seed=1, epoch=4, first_batch=first))
        assert ids_of(rest) == ids_of(whole[first:])
        halves = [
            list(small_cache.stream("train", 8, seed=1, epoch=4, first_batch=first, rank=rank, world_size=2))
            for rank in range(2)
        ]
        for batch, parts in zip(whole[first:], zip(*halves, strict=True), strict=True):
            assert sorted(ids_of([batch])) == sorted(ids_of(list(parts)))


def test_last_short_batch_is_kept_on_demand(small_cache: Cache) -> None:
    sizes = [len(batch.input_ids) for batch in small_cache.stream("train", 32, seed=0, drop_last=False)]
    assert sizes == [32, 32, 6]
    of_ranks = [
        [
            len(batch.input_ids)
            for batch in small_cache.stream("train", 32, seed=0, drop_last=False, rank=r, world_size=4)
        ]
        for r in range(4)
    ]
    assert of_ranks == [[8, 8, 1], [8, 8, 2], [8, 8, 1], [8, 8, 2]]


@pytest.mark.usefixtures("small_runs")
def test_a_rank_opens_only_shards_that_it_has_windows_of(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", make_spec(train=96, per_chunk=4, per_shard=8))
    cache = open_cache(tmp_path / "cache")
    deal = Deal(32, 0, 8)
    wanted = {window // 8 for part in WindowOrder(96, 4, 8, seed=3).batches(deal) for window in part.ravel().tolist()}
    assert len(wanted) < 12, "or this test shows nothing"
    for shard in cache.manifest.shards:
        if shard.split == "train" and shard.first_window // 8 not in wanted:
            (tmp_path / "cache" / shard.name).unlink()
    assert len(list(cache.stream("train", 32, seed=3, rank=0, world_size=8))) == 3


def test_a_cache_of_longer_shards_can_be_read_in_the_order_of_another(tmp_path: Path) -> None:
    few = write_cache(tmp_path / "few", make_spec(train=280, per_chunk=4, per_shard=280))
    many = write_cache(tmp_path / "many", make_spec(train=280, per_chunk=4, per_shard=4))
    expected = ids_of(list(many.stream("train", 8, seed=0)))
    assert ids_of(list(few.stream("train", 8, seed=0, windows_per_shard=4))) == expected
    assert ids_of(list(few.stream("train", 8, seed=0))) != expected
