"""docs/scale.md is what was measured and assumed, and what it simulates is what a reader does."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scale, scale_model, scale_reader
from conftest import ROOT, TOKENIZER_JSON, make_spec
from tristill.cache import Cache, CacheRequestError, CacheWriter, open_cache
from tristill.cache.manifest import load_manifest, refuse_too_many_shards
from tristill.cache.order import Deal


def test_the_tables_of_the_page_are_those_of_what_was_measured() -> None:
    measured = json.loads(scale.RESULTS.read_text(encoding="utf-8"))
    assert measured["tables"] == scale_model.tables(measured), "run `python -m benchmarks.scale --tables && make docs`"
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: scale\.(\w+) -->", page)) == measured["tables"].keys()


def test_bytes_and_time_are_what_arithmetic_by_hand_gives() -> None:
    small, large = scale_model.TEACHERS
    assert math.isclose(1e12 / small.dump_rate / 3600, 2 * 1e9 * 1e12 / (0.4 * 989e12) / 3600)
    assert math.isclose(small.dump_rate, 70 * large.dump_rate)
    measured = {"ids_bytes": 1.0, "signals_bytes": 1.5, "target_bytes": 200.0, "vocab_size": 2048, "kept_ids": 0.0}
    dense = {**measured, "width": 256, "profile": {"kind": "dense"}}
    # 64 times as many ids: 6 bits more of the input id. 8 times as wide: 8 times the bytes.
    assert math.isclose(scale_model.bytes_per_position(dense, small), 1.0 + 1.5 + 8 * 200 + 6 / 8)
    draws = {**measured, "width": 0, "kept_ids": 3.0, "profile": {"kind": "sampled"}}
    assert math.isclose(scale_model.bytes_per_position(draws, large), 1.0 + 1.5 + 200 + 6 / 8 * 4)
    assert scale_model.time_text(90) == "1.5 min"
    assert scale_model.size_text(31.6e12) == "31.6 TB"


@pytest.fixture
def many(small_cache: Cache, tmp_path: Path) -> Path:
    """A cache of 150 shards, without data."""
    scale_reader.simulated_cache(small_cache.folder, tmp_path / "many", 150)
    return tmp_path / "many"


def test_a_simulated_cache_is_one_for_all_that_opening_looks_at(many: Path) -> None:
    manifest = load_manifest(many)
    assert (many / "cache.json").read_text() == manifest.to_json()
    assert len(open_cache(many).manifest.shards) == 150
    found = scale_reader.measured_opening(many)
    assert (found["refused"], found["fingerprint"]) == (None, manifest.fingerprint)
    assert min(found["open_s"], found["mid_epoch_s"], found["start_mib"]) > 0


def test_what_ranks_read_is_counted_as_their_own_readers_would(many: Path) -> None:
    spec = load_manifest(many).spec
    world_size, size = 16, 512
    deals = [Deal(size, rank, world_size) for rank in range(world_size)]
    taken = [np.concatenate(list(scale_reader.order_of(spec).batches(deal))) for deal in deals]
    epoch = np.sort(np.concatenate([windows.ravel() for windows in taken]))
    assert (epoch == np.arange(spec.splits["train"].num_windows)).all(), "ranks share every window once"
    found = scale_reader.simulated_epoch(spec, (world_size,), size)[str(world_size)]
    shards = [set((windows // spec.windows_per_shard).ravel().tolist()) for windows in taken]
    machines = [set().union(*shards[first : first + 8]) for first in (0, 8)]
    chunks = sum(len(set((windows // spec.windows_per_chunk).ravel().tolist())) for windows in taken)
    assert found["shards_per_rank"] == sum(map(len, shards)) / world_size
    assert found["shards_per_machine"] == sum(map(len, machines)) / 2
    assert found["fetches"] == sum(map(len, machines)) / 150
    assert found["decoded"] == chunks * spec.windows_per_chunk / len(epoch)
    assert found["fetches"] < found["fetches_in_order"] == 2


def test_shares_that_are_not_a_readers_are_noticed(many: Path) -> None:
    spec = load_manifest(many).spec
    windows = np.concatenate([group.windows for _, group in scale_reader.order_of(spec).groups()])
    batches = windows[: len(windows) // 512 * 512].reshape(-1, 512)
    scale_reader.assert_dealt_alike(spec, batches, 8)
    with pytest.raises(AssertionError, match="ranks do not take"):
        scale_reader.assert_dealt_alike(spec, batches[::-1], 8)


def test_more_shards_than_a_manifest_has_room_for_are_refused_before_anything_is_dumped(many: Path) -> None:
    spec = make_spec(train=16_000_000)
    with pytest.raises(
        CacheRequestError, match="would have 1000001 shards of 96 positions, expected at most"
    ) as caught:
        CacheWriter(many / "other", spec, TOKENIZER_JSON)
    assert not (many / "other").exists()
    most, enough = map(int, re.findall(r"at most (\d+),.* to (\d+)$", str(caught.value))[0])
    refuse_too_many_shards(make_spec(train=16_000_000, per_shard=enough // 6 // 4 * 4))
    record_bytes = len((many / "cache.json").read_bytes()) / 150
    assert 0.6 < most * record_bytes / 2**28 < 1, "what is accepted fits, without much to spare"
