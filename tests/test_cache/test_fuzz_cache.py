"""Whatever a manifest, a shard, a frame or a payload holds: an error of this package, or the data."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from damage_walk import everything
from hypothesis import strategies as st
from mutations import changed, edited, fuzz
from tiny_caches import KINDS, T, write_tiny_cache

from tristill.cache import CacheCorruptError, CacheError, open_cache
from tristill.cache.hdf5 import Hdf5Error, Hdf5File
from tristill.cache.manifest import load_manifest
from tristill.cache.parts import part_coders
from tristill.cache.profiles.profile import Place
from tristill.cache.shard import OpenShard
from tristill.cache.spec import CacheSpec
from tristill.cache.tables import load_tables

SHARD = "train-00000.h5"
LARGEST_BYTES = 2**26
# Cases: a sample in CI, all when slow: at least 20,000 of each target over the three kinds of caches.
counts = pytest.mark.parametrize("num_cases", [60, pytest.param(8_000, marks=pytest.mark.slow)])
kinds = pytest.mark.parametrize("kind", KINDS)


class Peak:
    """The most bytes that a block has taken, beyond what was there when it began; what hypothesis keeps does not count."""

    def __init__(self) -> None:
        self.num_bytes = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            yield
        finally:
            self.num_bytes = max(self.num_bytes, tracemalloc.get_traced_memory()[1] - before)


@pytest.fixture
def peak() -> Iterator[Peak]:
    tracemalloc.start()
    yield Peak()
    tracemalloc.stop()


def read_or_refuse(folder: Path, truth: list[bytes], tally: Counter[str]) -> None:
    """The data or a CacheError; nothing else may come out."""
    try:
        assert everything(folder) == truth
        tally["read"] += 1
    except CacheError as exc:
        assert str(folder) in str(exc), "it says where"
        tally["refused"] += 1


@counts
@kinds
def test_a_manifest_with_changed_fields_is_refused_or_means_the_same_data(
    tmp_path: Path, kind: str, num_cases: int
) -> None:
    write_tiny_cache(tmp_path, kind)
    path, truth, tally = tmp_path / "cache.json", everything(tmp_path), Counter[str]()
    original = json.loads(path.read_bytes())

    def check(value: Any) -> None:
        path.write_text(json.dumps(value))
        read_or_refuse(tmp_path, truth, tally)

    fuzz(check, changed(original), num_cases)
    print(kind, "fields", dict(tally))
    assert tally["refused"] > num_cases / 2


@counts
@kinds
def test_a_manifest_of_any_bytes_is_refused_or_means_the_same_data(tmp_path: Path, kind: str, num_cases: int) -> None:
    write_tiny_cache(tmp_path, kind)
    path, truth, tally = tmp_path / "cache.json", everything(tmp_path), Counter[str]()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        read_or_refuse(tmp_path, truth, tally)

    fuzz(check, edited(path.read_bytes()), num_cases)
    print(kind, "bytes", dict(tally))
    assert tally["refused"] > num_cases / 2


def test_windows_that_no_file_holds_take_little_memory(tmp_path: Path, peak: Peak) -> None:
    """As many chunks as a shard may have, each of a quarter of the windows that it may: few bytes are on disk."""
    write_tiny_cache(tmp_path, "hidden")
    path = tmp_path / "cache.json"
    manifest = json.loads(path.read_bytes())
    per_chunk, most = 2**11, 2**27
    manifest["spec"] |= {"windows_per_chunk": per_chunk, "windows_per_shard": most}
    manifest["spec"]["splits"]["train"]["num_windows"] = manifest["shards"][0]["num_windows"] = most
    path.write_text(json.dumps(manifest))
    assert len(load_manifest(tmp_path).shards) == 1
    with peak.watched(), pytest.raises(CacheError, match=str(tmp_path)):
        everything(tmp_path)
    assert peak.num_bytes < 2 * LARGEST_BYTES


@counts
@kinds
def test_a_shard_of_any_bytes_is_refused_or_reads_as_before(tmp_path: Path, kind: str, num_cases: int) -> None:
    """The manifest's size is made to fit, so that the reader looks inside."""
    write_tiny_cache(tmp_path, kind)
    path, truth, tally = tmp_path / SHARD, everything(tmp_path), Counter[str]()
    manifest = json.loads((tmp_path / "cache.json").read_bytes())

    def check(content: bytes) -> None:
        path.write_bytes(content)
        manifest["shards"][0]["file_bytes"] = max(1, len(content))
        (tmp_path / "cache.json").write_text(json.dumps(manifest))
        read_or_refuse(tmp_path, truth, tally)

    fuzz(check, edited(path.read_bytes()), num_cases)
    print(kind, "shard", dict(tally))
    assert tally["refused"] > num_cases / 2


@counts
@kinds
def test_a_shard_whose_spec_was_changed_is_refused(tmp_path: Path, kind: str, num_cases: int) -> None:
    spec = write_tiny_cache(tmp_path, kind)
    original = json.loads(spec.to_json())
    found = Counter[str]()

    def check(value: Any) -> None:
        try:
            same = CacheSpec.from_json(json.dumps(value), "a shard") == spec
            found["same" if same else "another"] += 1
        except CacheError:
            found["refused"] += 1

    fuzz(check, changed(original), num_cases)
    print(kind, "spec", dict(found))
    assert found["refused"] > num_cases / 2


@counts
def test_tables_of_any_bytes_give_their_declared_shapes_or_are_refused(tmp_path: Path, num_cases: int) -> None:
    spec = write_tiny_cache(tmp_path, "coded")
    image = (tmp_path / "tables.h5").read_bytes()
    found = Counter[str]()

    def check(content: bytes) -> None:
        try:
            file = Hdf5File.of(content)
            for table in spec.tables:
                dataset = file.dataset(table.name)
                for chunk in dataset.chunk_table(1) if dataset else ():
                    assert chunk.offset + chunk.num_bytes <= len(content)
            found["read"] += 1
        except Hdf5Error:
            found["refused"] += 1

    fuzz(check, edited(image), num_cases * 3)
    print("tables", dict(found))
    assert found["refused"]


@counts
@pytest.mark.parametrize("kind", ["coded", "masked"])
def test_a_payload_of_any_bits_gives_bounded_arrays_or_is_refused(
    tmp_path: Path, kind: str, num_cases: int, peak: Peak
) -> None:
    """Words, raw bits and states at random behind a header that fits: never beyond its end, nor of another shape."""
    spec = write_tiny_cache(tmp_path, kind)
    coder = part_coders(spec, load_tables(tmp_path, spec))["target"]
    (dataset,) = spec.datasets_of(spec.target_part)
    mask = np.ones((2, T), bool) if kind == "masked" else None
    place = Place("train", 0, 2, T, mask)
    found = Counter[str]()

    def check(drawn: tuple[int, int, int, int]) -> None:
        num_words, num_raw_bytes, seed, few = drawn
        payload = np.random.default_rng(seed).integers(0, 256 >> few, dataset.array.num_bytes).astype(np.uint8)
        payload[:8] = np.array([num_words, num_raw_bytes], "<u4").view("u1")
        try:
            with peak.watched():
                arrays = coder.decode(payload, place)
        except (CacheCorruptError, ValueError, IndexError):  # the reader names the chunk for each of these
            found["refused"] += 1
            return
        found["read"] += 1
        for array in spec.target_part.arrays:
            assert arrays[array.name].shape == (2, *array.shape)

    sizes = st.one_of(st.integers(0, dataset.array.num_bytes // 2), st.integers(0, 2**32 - 1))
    fuzz(check, st.tuples(sizes, sizes, st.integers(0, 2**32), st.integers(0, 7)), num_cases * 2)
    print(kind, "payload", dict(found), f"peak {peak.num_bytes} bytes")
    assert found["refused"]
    assert peak.num_bytes < LARGEST_BYTES


@counts
def test_a_frame_of_any_bytes_is_refused_or_of_its_declared_size(tmp_path: Path, num_cases: int, peak: Peak) -> None:
    """Bombs among them: frames that say another size, no size, or that hold more than they say."""
    spec = write_tiny_cache(tmp_path, "hidden")
    (shard,) = load_manifest(tmp_path).ranges
    opened = OpenShard(tmp_path / SHARD, spec, shard)
    good = opened._read_frame("input_ids", 0)
    size = len(zstandard.ZstdDecompressor().decompress(good))
    bombs = [
        zstandard.ZstdCompressor(write_checksum=True, write_content_size=known).compress(bytes(2**28))
        for known in (True, False)
    ]
    forged = bombs[0][:4] + good[4:6] + bombs[0][6:]
    found = Counter[str]()

    def check(frame: bytes) -> None:
        try:
            with peak.watched():
                assert opened._decompressed("input_ids", 0, frame).nbytes == size
            found["read"] += 1
        except CacheCorruptError:
            found["refused"] += 1

    fuzz(check, st.one_of(edited(good), *map(edited, bombs), edited(forged)), num_cases * 3)
    opened.close()
    print("frames", dict(found), f"peak {peak.num_bytes} bytes")
    assert found["refused"]
    assert peak.num_bytes < LARGEST_BYTES


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    write_tiny_cache(tmp_path, "hidden")
    for text in ("[" * 60_000, '{"a":' * 60_000, '{"spec":' + "[" * 60_000):
        (tmp_path / "cache.json").write_text(text)
        with pytest.raises(CacheCorruptError, match="breaks the cache format"):
            open_cache(tmp_path)
        with pytest.raises(CacheCorruptError, match="is not a JSON object"):
            CacheSpec.from_json(text, "a shard")
