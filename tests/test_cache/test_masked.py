"""Caches of which only some positions count: what is stored and read, what it takes, and what is refused."""

import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import zstandard
from coded_profiles import PROFILES, VOCAB, check, fitted_tables, given_arrays, spec_with_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from conftest import TOKENIZER_JSON, make_spec, window_arrays
from tristill.cache import (
    Cache,
    CacheCorruptError,
    CacheRequestError,
    CacheSpec,
    CacheWriter,
    CodedLayer,
    HiddenSpec,
    Int8Hidden,
    SplitSpec,
    TransformHidden,
    open_cache,
    verify_cache,
)
from tristill.cache.calibration import Calibration
from tristill.cache.coding.streams import Histograms
from tristill.cache.hidden import NUM_ACTIVITIES
from tristill.cache.hidden_coder import activity_edges
from tristill.cache.histograms import sample
from tristill.cache.manifest import load_manifest
from tristill.cache.parts import PartCoder, num_lanes
from tristill.cache.peek import peek
from tristill.cache.profiles.profile import Place
from tristill.cache.repair import manifest_of_shards
from tristill.cache.spec import AnyProfile

TRAIN, VALIDATION, T = 21, 5, 6


def silent(num_bytes: int) -> None:
    """Progress is of no interest here."""


def runs(generator: np.random.Generator, shape: tuple[int, int], share: float) -> np.ndarray:
    """Masks as turns of a chat make them: runs of positions that count, `share` of all."""
    flat = np.zeros(shape[0] * shape[1], bool)
    while flat.mean() < share:
        first = generator.integers(len(flat))
        flat[first : first + generator.integers(1, 40)] = True
    return flat.reshape(shape)


def mask_of(split: str, num_windows: int, context_length: int = T) -> np.ndarray:
    """Some windows in full, some not at all, and whole chunks of which nothing counts."""
    generator = np.random.default_rng(len(split))
    mask = generator.random((num_windows, context_length)) < 0.3
    mask[1], mask[2] = True, False
    mask[8:12] = False
    return mask


def masked(spec: CacheSpec) -> CacheSpec:
    splits = {
        name: SplitSpec(
            **split.model_dump(exclude={"counted_positions"}),
            counted_positions=int(mask_of(name, split.num_windows, spec.context_length).sum()),
        )
        for name, split in spec.splits.items()
    }
    return CacheSpec.model_validate(spec.model_dump() | {"format_version": 3, "splits": splits})


def content(spec: CacheSpec, split: str, windows: range) -> dict[str, np.ndarray]:
    """What a dump would append, with rubbish where nothing counts: it must not be kept."""
    arrays = window_arrays(spec, split, windows)
    arrays["input_ids"] %= VOCAB
    arrays["mask"] = mask_of(split, spec.splits[split].num_windows)[windows.start : windows.stop].astype("u1")  # type: ignore[index]
    if spec.profile.make_coder is not None:
        for row, window in enumerate(windows):
            one = given_arrays(spec.profile, Place(split, window, 1, T), window)
            for name, array in one.items():
                arrays[name][row] = array[0]
    for layer in spec.hidden.layers if spec.hidden and isinstance(spec.hidden.coding, TransformHidden) else ():
        generator = np.random.default_rng(layer + 100 * windows.start)
        arrays[f"hidden_{layer}"] = generator.integers(-9, 9, arrays[f"hidden_{layer}"].shape).astype("<i2")
    return arrays


def write(folder: Path, spec: CacheSpec, image: bytes | None, *, batch: int = 1, at_most: int | None = None) -> None:
    writer = CacheWriter(folder, spec, TOKENIZER_JSON, image)
    for shard in writer.missing_shards()[:at_most]:
        shard_writer = writer.shard(shard)
        end = shard.first_window + shard.num_windows
        for first in range(shard.first_window, end, batch):
            rows = range(first, min(first + batch, end))
            parts = [content(spec, shard.split, range(row, row + 1)) for row in rows]
            shard_writer.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        shard_writer.commit()
    if at_most is None:
        writer.finish()


def spec_and_tables(profile: AnyProfile | None) -> tuple[CacheSpec, bytes | None]:
    """Of a coded profile, or of plain_topk with two layers of hidden states."""
    if profile is None:
        return masked(make_spec(TRAIN, VALIDATION)), None
    place = Place("train", 0, 8, T)
    tables = fitted_tables(profile, given_arrays(profile, place, 0), place)
    _, image = spec_with_tables(profile, tables, TRAIN)
    spec, image = spec_with_tables(profile, tables, TRAIN)
    return masked(spec), image


@pytest.fixture(params=["plain", *sorted(PROFILES)])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cache]:
    write(tmp_path / "cache", *spec_and_tables(PROFILES.get(request.param)))
    found = open_cache(tmp_path / "cache")
    yield found
    found.close()


def test_positions_that_count_come_back_and_others_are_zero(cache: Cache) -> None:
    (batch,) = cache.stream("train", TRAIN, seed=None)
    mask = mask_of("train", TRAIN)
    assert batch.mask is not None
    np.testing.assert_array_equal(batch.mask, mask)
    parts = [content(cache.spec, "train", range(window, window + 1)) for window in range(TRAIN)]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    np.testing.assert_array_equal(batch.input_ids, whole["input_ids"])
    for name, array in {**batch.target, **batch.signals}.items():
        assert not array[~mask].any(), name
    np.testing.assert_array_equal(batch.signals["teacher_entropy"][mask] * 8, whole["teacher_entropy"][mask])
    if cache.spec.profile.make_coder is None:
        for name, array in batch.target.items():
            np.testing.assert_array_equal(array[mask], whole[name][mask])
        return
    for window in np.flatnonzero(mask.all(axis=1)):  # what `check` says of the extremes it knows to be there
        given = {name: whole[name][window : window + 1] for name in batch.target}
        found = {name: array[window : window + 1] for name, array in batch.target.items()}
        check(cache.spec.profile, given, found, Place("train", int(window), 1, T))


def test_windows_and_shuffled_batches_agree_with_the_stored_order(cache: Cache) -> None:
    (whole,) = cache.stream("train", TRAIN, seed=None)
    for batch in cache.stream("train", 4, seed=3):
        for row, ids in enumerate(batch.input_ids):
            (window,) = np.flatnonzero((whole.input_ids == ids).all(axis=1))
            one = cache.window("train", int(window))
            assert batch.mask is not None and whole.mask is not None and one.mask is not None  # noqa: PT018
            for found in (batch.mask[row], one.mask[0]):
                np.testing.assert_array_equal(found, whole.mask[window])
            for name, array in batch.target.items():
                np.testing.assert_array_equal(array[row], whole.target[name][window])
                np.testing.assert_array_equal(one.target[name][0], whole.target[name][window])


def test_bytes_do_not_depend_on_batches_rubbish_or_interruptions(cache: Cache, tmp_path: Path) -> None:
    image = (cache.folder / "tables.h5").read_bytes() if cache.spec.tables_fingerprint else None
    write(tmp_path / "other", cache.spec, image, batch=5, at_most=1)
    write(tmp_path / "other", cache.spec, image, batch=3)
    expected = {path.name: path.read_bytes() for path in cache.folder.iterdir()}
    assert expected == {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}


def test_verify_repair_peek_and_histograms_know_the_mask(cache: Cache) -> None:
    assert verify_cache(cache.folder, silent) == []
    manifest = load_manifest(cache.folder)
    assert manifest_of_shards(cache.folder, silent) == manifest
    mask = mask_of("train", TRAIN)
    assert cache.spec.num_positions("train") == mask.sum()
    found = sample(cache)
    assert found.positions == mask.sum()
    for histogram in (found.entropy_nats, found.head_mass):
        assert histogram is None or sum(histogram.counts) == mask.sum()
    for window in (0, 1, 2):
        seen = peek(cache, "train", window, range(T), num_top=3).positions
        assert [bool(position.top) for position in seen] == mask[window].tolist()
        assert [position.entropy_nats is not None for position in seen] == mask[window].tolist()
    means = cache.mean_signals("train")
    expected = [cache.window("train", w).signals["teacher_entropy"][0][mask[w]].mean() for w in (0, 1)]
    np.testing.assert_allclose(means["teacher_entropy"][:2], expected, rtol=1e-6)
    assert means["teacher_entropy"][2] == 0


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(PROFILES)), st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 20), st.data())
def test_any_mask_round_trips(name: str, seed: int, num_windows: int, context_length: int, data: st.DataObject) -> None:
    """Coding under a mask is coding the positions that count, dither of their places included, and nothing else."""
    profile = PROFILES[name]
    bits = st.lists(st.booleans(), min_size=num_windows * context_length, max_size=num_windows * context_length)
    mask = np.array(data.draw(bits)).reshape(num_windows, context_length)
    whole, place = Place("train", 3, num_windows, context_length), Place("train", 3, num_windows, context_length, mask)
    arrays = given_arrays(profile, whole, seed)
    tables = {f"target.{key}": table for key, table in fitted_tables(profile, arrays, whole).items()}
    spec = make_spec(9, 3, profile=profile, hidden=None, tables_fingerprint="0" * 64, context_length=context_length)
    coder = PartCoder(spec.target_part, tables)
    payload = np.frombuffer(coder.encode(arrays, place), np.uint8)
    assert len(payload) <= spec.target_part.capacity(num_windows, context_length)
    found = coder.decode(payload, place)
    expected = coder.decode(np.frombuffer(coder.encode(arrays, whole), np.uint8), whole)
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key][mask], array[mask])
        assert not found[key][~mask].any()
        assert found[key].dtype == array.dtype


@pytest.mark.parametrize("coding", ["float16", "int8", "transform"])
@pytest.mark.parametrize("stride", [1, 2])
def test_hidden_states_are_kept_where_positions_count(tmp_path: Path, coding: str, stride: int) -> None:
    import hashlib

    from tristill.cache.tables import tables_image

    codings = {
        "int8": Int8Hidden(),
        "transform": TransformHidden(delta=True, coded=(CodedLayer(step=0.5, rank=5),) * 2),
    }
    fields = {"coding": codings[coding]} if coding in codings else {}
    hidden = HiddenSpec(layers=(1, 3), width=8, stride=stride, **fields)  # type: ignore[arg-type]
    is_coded, image = coding == "transform", None
    plain = make_spec(TRAIN, VALIDATION, hidden=hidden, tables_fingerprint="0" * 64 if is_coded else None)
    spec = masked(plain)
    if is_coded:
        tables: dict[str, np.ndarray] = {}
        for part in spec.hidden_parts((1, 3)):
            values = content(spec, "train", range(1))[part.name].reshape(-1, 5)
            own = {table.name: np.zeros(table.shape, table.dtype) for table in part.tables}
            own["activity_edges"] = activity_edges(values, NUM_ACTIVITIES)
            histograms = Histograms(part.models)
            assert part.coder is not None
            part.coder(own).write({part.name: values}, Place("train", 0, 1, len(values)), histograms)
            tables |= {f"{part.name}.{name}": table for name, table in {**own, **histograms.frequencies()}.items()}
        calibration = Calibration(
            request="a test", student="none", positions=0, profile={}, target=None, points=(), chosen=None
        )
        image = tables_image(spec.tables, tables, calibration)
        spec = spec.model_copy(update={"tables_fingerprint": hashlib.sha256(image).hexdigest()})
    write(tmp_path / "cache", spec, image)
    found = open_cache(tmp_path / "cache")
    (batch,) = found.stream("train", TRAIN, seed=None, hidden_layers=(1, 3))
    kept = mask_of("train", TRAIN)[:, ::stride]
    parts = [content(spec, "train", range(window, window + 1)) for window in range(TRAIN)]
    for layer in (1, 3):
        name = f"hidden_{layer}"
        expected = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(batch.hidden[layer][kept], expected[kept])
        assert not batch.hidden[layer][~kept].any()
        assert expected[~kept].any(), "there was something to leave out"
        for scale in batch.hidden_scale.values():
            assert not scale[~kept].any()
    found.close()


@pytest.mark.parametrize("name", ["plain", "topk", "sampled", "transform"])
def test_a_fifth_of_the_positions_takes_about_a_fifth_of_the_bytes(tmp_path: Path, name: str) -> None:
    """All that is stored of targets and signals, in chunks of 8,192 positions, in runs as turns of a chat make them."""
    profile, num_windows, context_length = PROFILES.get(name), 128, 256
    wide: dict[str, object] = {"per_chunk": 32, "per_shard": 128, "context_length": context_length, "hidden": None}
    place = Place("train", 0, num_windows, context_length)
    changes, image = {}, None
    if profile is not None:
        arrays = given_arrays(profile, place, 0)
        tables = fitted_tables(profile, arrays, place)
        tabled, image = spec_with_tables(profile, tables, num_windows)
        changes = {"profile": profile, "tables_fingerprint": tabled.tables_fingerprint}
    sizes = {}
    mask = runs(np.random.default_rng(0), (num_windows, context_length), 0.2)
    for share in (mask.mean(), 1.0):
        counted = mask if share < 1 else np.ones_like(mask)
        spec = make_spec(num_windows, 1, **wide, **changes)  # type: ignore[arg-type]
        split = {**spec.splits["train"].model_dump(), "counted_positions": int(counted.sum())}
        spec = CacheSpec.model_validate(spec.model_dump() | {"format_version": 3, "splits": {"train": split}})
        writer = CacheWriter(tmp_path / f"{share}", spec, TOKENIZER_JSON, image)
        (shard,) = writer.missing_shards()
        shard_writer = writer.shard(shard)
        given = window_arrays(spec, "train", range(num_windows)) | (arrays if profile else {})
        shard_writer.append(given | {"mask": counted.astype("u1")})
        shard_writer.commit()
        (record,) = writer.finish().shards
        sizes[share] = record.stored_bytes
    part, whole = sizes[mask.mean()], sizes[1.0]
    targets = [key for key in whole if key not in {"input_ids", "mask"}]
    ratio = sum(part[key] for key in targets) / sum(whole[key] for key in targets)
    assert mask.mean() == pytest.approx(0.2, abs=0.01)
    assert ratio == pytest.approx(mask.mean(), abs=0.02), ratio
    assert part["mask"] / mask.size < 0.06, "bytes of mask per position"
    assert whole["mask"] / mask.size < 0.01


def test_lanes_follow_the_positions_that_count() -> None:
    def lanes(count: int) -> int:
        mask = np.zeros((8, 2048), bool)
        mask.ravel()[:count] = True
        return num_lanes(Place("train", 0, 8, 2048, mask))

    assert num_lanes(Place("train", 0, 1, 4)) == 1024
    assert [lanes(n) for n in (0, 1, 511, 512, 1023, 1638, 8191, 8192, 16384)] == [
        32,
        32,
        32,
        64,
        64,
        128,
        512,
        1024,
        1024,
    ]


def test_a_mask_of_other_numbers_is_neither_written_nor_read(tmp_path: Path) -> None:
    spec, _ = spec_and_tables(None)
    writer = CacheWriter(tmp_path / "cache", spec, TOKENIZER_JSON)
    shard = writer.missing_shards()[0]
    arrays = content(spec, shard.split, range(1))
    with pytest.raises(CacheRequestError, match="dataset mask: expected 1 for positions that count and 0 for others"):
        writer.shard(shard).append(arrays | {"mask": arrays["mask"] + 1})
    write(tmp_path / "cache", spec, None)
    path = tmp_path / "cache" / "train-00000.h5"
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(b"\x02" * (4 * T))
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        file["mask"].id.write_direct_chunk((0, 0), frame)
    message = r"train-00000\.h5: dataset mask, chunk 0: holds 2, expected 1 for positions that count and 0 for others"
    (found,) = verify_cache(tmp_path / "cache", silent)
    assert re.search(message, found) or "bytes" in found
    record = load_manifest(tmp_path / "cache").shards[0]
    if path.stat().st_size == record.file_bytes:
        with pytest.raises(CacheCorruptError, match=message):
            open_cache(tmp_path / "cache").window("train", 0)


def test_verify_finds_a_flip_in_the_mask(tmp_path: Path) -> None:
    write(tmp_path, *spec_and_tables(PROFILES["topk"]))
    path = tmp_path / "train-00000.h5"
    with h5py.File(path, "r") as file:
        stored = file["mask"].id.get_chunk_info(0)
    whole = path.read_bytes()
    for place in range(stored.byte_offset, stored.byte_offset + stored.size):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert len(verify_cache(tmp_path, silent)) == 1
    path.write_bytes(whole)
    assert verify_cache(tmp_path, silent) == []


def test_a_mask_that_lies_is_damage_and_no_crash(tmp_path: Path) -> None:
    """More positions than were coded: the payload ends early, or what it holds breaks its bounds."""
    write(tmp_path, *spec_and_tables(PROFILES["transform"]))
    path = tmp_path / "train-00000.h5"
    frame = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(b"\x01" * (4 * T))
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        file["mask"].id.write_direct_chunk((0, 0), frame)
    manifest = (tmp_path / "cache.json").read_text()
    record = load_manifest(tmp_path).shards[0]
    assert record.name == "train-00000.h5"
    (tmp_path / "cache.json").write_text(
        manifest.replace(f'"file_bytes":{record.file_bytes}', f'"file_bytes":{path.stat().st_size}', 1)
    )
    with pytest.raises(CacheCorruptError, match=r"dataset target, chunk 0: "):
        open_cache(tmp_path).window("train", 0)


def test_a_spec_says_how_many_positions_count_if_and_only_if_it_has_a_mask() -> None:
    spec, _ = spec_and_tables(None)
    plain = make_spec(TRAIN, VALIDATION)
    assert "counted_positions" not in plain.to_json()
    assert "mask" not in {dataset.name for dataset in plain.datasets}
    for fields, message in (
        (plain.model_dump() | {"format_version": 3}, "counted_positions: found None in format version 3; it is there"),
        (spec.model_dump() | {"format_version": 2}, r"counted_positions: found \d+ in format version 2; it is there"),
    ):
        with pytest.raises(ValidationError, match=message):
            CacheSpec.model_validate(fields)
    beyond = spec.model_dump()
    beyond["splits"]["train"]["counted_positions"] = TRAIN * T + 1
    with pytest.raises(ValidationError, match=rf"found {TRAIN * T + 1} of {TRAIN * T} positions"):
        CacheSpec.model_validate(beyond)
