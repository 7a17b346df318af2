"""The order of windows is a pure function of (seed, epoch)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cache.order
from cache import Cache
from cache.order import WindowOrder
from conftest import window_arrays


@given(st.integers(1, 3000), st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 5))
def test_every_window_comes_exactly_once(num_windows: int, per_block: int, seed: int, epoch: int) -> None:
    order = list(WindowOrder(num_windows, per_block, seed, epoch).windows())
    assert sorted(order) == list(range(num_windows))
    assert order == list(WindowOrder(num_windows, per_block, seed, epoch).windows())


@given(st.integers(1, 3000), st.integers(1, 20), st.integers(0, 100), st.data())
def test_starting_in_the_middle_gives_the_rest(
    num_windows: int, per_block: int, seed: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, num_windows))
    whole = list(WindowOrder(num_windows, per_block, seed).windows())
    assert list(WindowOrder(num_windows, per_block, seed).windows(first)) == whole[first:]


def test_epochs_and_seeds_are_unrelated() -> None:
    orders = [np.array(list(WindowOrder(20_000, 1, seed, epoch).windows())) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    places = [np.argsort(order) for order in orders]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(places[a], places[b])[0, 1]) < 0.03


def test_the_order_is_as_it_has_always_been() -> None:
    assert list(WindowOrder(10, 2, seed=7, epoch=3).windows()) == [8, 0, 6, 3, 5, 4, 2, 9, 1, 7]


def ids_of(batches: list) -> list[bytes]:  # type: ignore[type-arg]
    return [row.tobytes() for batch in batches for row in batch.input_ids]


@pytest.fixture
def two_blocks_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shuffle buffers even in a small cache."""
    monkeypatch.setattr(cache.order, "BLOCKS_PER_GROUP", 2)


@pytest.mark.usefixtures("two_blocks_per_group")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_stream_is_the_same_at_any_world_size_and_thread_count(
    small_cache: Cache, world_size: int, threads: int
) -> None:
    expected = [
        window_arrays(small_cache.spec, "train", range(window, window + 1))["input_ids"].tobytes()
        for window in WindowOrder(70, 4, seed=5, epoch=2).windows()
    ]
    per_rank = [
        list(small_cache.stream("train", 8, seed=5, epoch=2, rank=rank, world_size=world_size, threads=threads))
        for rank in range(world_size)
    ]
    assert [len(batches) for batches in per_rank] == [70 // 8] * world_size
    joined = [ids_of([batch]) for step in zip(*per_rank, strict=True) for batch in step]
    assert [row for rows in joined for row in rows] == expected[: 70 // 8 * 8]


@pytest.mark.usefixtures("two_blocks_per_group")
def test_stream_resumes_in_the_middle_of_an_epoch(small_cache: Cache) -> None:
    whole = list(small_cache.stream("train", 8, seed=1, epoch=4))
    for first in range(len(whole) + 1):
        rest = list(small_cache.stream("train", 8, seed=1, epoch=4, first_batch=first))
        assert ids_of(rest) == ids_of(whole[first:])


def test_last_short_batch_is_kept_on_demand(small_cache: Cache) -> None:
    sizes = [len(batch.input_ids) for batch in small_cache.stream("train", 32, seed=0, drop_last=False)]
    assert sizes == [32, 32, 6]
