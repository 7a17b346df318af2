"""Each coded profile gives back what it was given, to the rounding that it states, over the whole of its domain."""

import threading
from pathlib import Path

import numpy as np
import pytest
from coded_profiles import (
    PROFILES,
    TRANSFORM,
    VOCAB,
    check,
    fitted_tables,
    given_arrays,
    sets_of,
    spec_with_tables,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TOKENIZER_JSON, make_spec
from tristill.cache import (
    Cache,
    CacheCorruptError,
    CacheSpec,
    CacheWriter,
    DenseProfile,
    Need,
    SampledProfile,
    TopKProfile,
    TransformProfile,
    open_cache,
)
from tristill.cache.coding.frequencies import Model
from tristill.cache.coding.rans import Decoder, Encoder, read_in_step
from tristill.cache.hashing import sha256_of_file
from tristill.cache.parts import PartCoder
from tristill.cache.profiles.dither import dither_bytes, dither_of
from tristill.cache.profiles.heads import (
    GAP_GROWTH,
    GAP_STEP,
    TAIL_STEP,
    HeadSize,
    fit_tail_predictor,
    gap_grid,
    gap_indices,
)
from tristill.cache.profiles.profile import Place
from tristill.cache.spec import AnyProfile

GOLDEN = Path(__file__).parent / "golden" / "version-2-transform"


def round_trip(
    profile: AnyProfile, arrays: dict[str, np.ndarray], place: Place, vocab_size: int = VOCAB
) -> dict[str, np.ndarray]:
    tables = fitted_tables(profile, arrays, place, vocab_size)
    assert profile.make_coder is not None
    coder = profile.make_coder(tables)
    models = {name: Model(tables[name]) for name in profile.models(vocab_size)}
    encoder = Encoder(models, 16)
    coder.write({name: place.gathered(array) for name, array in arrays.items()}, place, encoder)
    found = read_in_step([Decoder(models, np.frombuffer(encoder.finish(), np.uint8), 16)], [coder.read(place)])[0]
    return {name: place.scattered(array) for name, array in found.items()}


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(PROFILES)), st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 20))
def test_any_content_round_trips(name: str, seed: int, num_windows: int, context_length: int) -> None:
    profile, place = PROFILES[name], Place("train", 3, num_windows, context_length)
    arrays = given_arrays(profile, place, seed)
    check(profile, arrays, round_trip(profile, arrays, place), place)


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(sorted(PROFILES)), st.integers(0, 2**31), st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_chunks_decoded_in_step_are_those_decoded_alone(name: str, seed: int, counted: list[int]) -> None:
    """Masked ones, of more and fewer lanes, and empty ones too; 60 windows of 40 positions are two rounds and a rest."""
    profile, whole = PROFILES[name], Place("train", 0, 60, 40)
    generator = np.random.default_rng(seed)
    tables = fitted_tables(profile, given_arrays(profile, whole, seed), whole)
    spec = make_spec(60, 3, profile=profile, hidden=None, tables_fingerprint="0" * 64, context_length=40)
    coder = PartCoder(spec.target_part, {f"target.{key}": table for key, table in tables.items()})
    places = [whole] + [
        Place("train", 60 * i, 60, 40, generator.random((60, 40)) < share / 60) for i, share in enumerate(counted)
    ]
    payloads = [
        np.frombuffer(coder.encode(given_arrays(profile, place, seed + i), place), np.uint8)
        for i, place in enumerate(places)
    ]
    together = coder.decode_together(payloads, places)
    for payload, place, found in zip(payloads, places, together, strict=True):
        for key, array in coder.decode(payload, place).items():
            np.testing.assert_array_equal(found[key], array)


@pytest.mark.parametrize("vocab_size", [9, 65_537, 150_000])
def test_ids_of_small_and_large_vocabularies_round_trip(vocab_size: int) -> None:
    place = Place("train", 0, 2, 10)
    profile = TopKProfile(head=HeadSize(max_entries=9))
    arrays = given_arrays(profile, place, 0, vocab_size)
    found = round_trip(profile, arrays, place, vocab_size)
    assert [row.keys() for row in sets_of(arrays["head_ids"], arrays["head_logits"], arrays["head_count"])] == [
        row.keys() for row in sets_of(found["head_ids"], found["head_logits"], found["head_count"])
    ]


@given(st.floats(0, 3000))
def test_a_gap_is_rounded_to_half_a_step_of_its_grid(gap: float) -> None:
    rounded = float(gap_grid()[gap_indices(np.array([gap]))[0]])
    assert rounded == pytest.approx(gap, abs=0.52 * (GAP_STEP + GAP_GROWTH * gap) + 1e-4)


def test_tails_are_predicted_from_those_of_higher_temperatures() -> None:
    high = np.random.default_rng(0).normal(3, 1, 4000)
    low = 1.5 * high - 2 + np.random.default_rng(1).normal(0, 0.05, 4000)
    predictor = fit_tail_predictor(np.stack([low, high], axis=1))
    np.testing.assert_allclose(predictor[0, [0, 2]] / 65536, [1.5, -2 / TAIL_STEP], rtol=0.02)
    assert predictor[1, 2] / 65536 == pytest.approx(3 / TAIL_STEP, rel=0.02)


def test_dither_is_a_function_of_the_place_alone_and_uniform() -> None:
    whole = dither_bytes(7, "train", 10, 6, 500)
    np.testing.assert_array_equal(dither_bytes(7, "train", 13, 2, 500), whole[3:5])
    assert (dither_bytes(7, "validation", 10, 6, 500) != whole).mean() > 0.9
    assert (dither_bytes(8, "train", 10, 6, 500) != whole).mean() > 0.9
    uniform = dither_of(dither_bytes(0, "train", 0, 200, 500)).ravel()
    assert abs(uniform.mean()) < 4 * 12**-0.5 / len(uniform) ** 0.5
    assert uniform.var() == pytest.approx(1 / 12, rel=0.01)
    assert np.abs(uniform).max() < 0.5


def test_dithered_coefficients_are_unbiased_and_plain_ones_are_not() -> None:
    """The mean over dither seeds tends to the truth as 1 / sqrt(seeds); without dither it stays where it is."""
    place = Place("train", 0, 4, 32)
    truth = np.random.default_rng(3).uniform(-1.5, 1.5, (4, 32, 7)).astype("<f2")
    means = {}
    for dither in (True, False):
        total = np.zeros(truth.shape)
        for seed in range(256):
            profile = TRANSFORM.model_copy(update={"dither": dither, "seed": seed})
            arrays = {**given_arrays(profile, place, 0), "coefficients": truth}
            if seed == 0:
                tables = fitted_tables(profile, arrays, place)
            assert profile.make_coder is not None
            coder = profile.make_coder(tables)
            models = {name: Model(tables[name]) for name in profile.models(VOCAB)}
            encoder = Encoder(models, 16)
            coder.write(arrays, place, encoder)
            decoder = Decoder(models, np.frombuffer(encoder.finish(), np.uint8), 16)
            total += place.scattered(read_in_step([decoder], [coder.read(place)])[0]["coefficients"])
            if seed in (15, 255):
                means[dither, seed + 1] = np.sqrt(np.mean((total / (seed + 1) - truth) ** 2))
    one_step = 12**-0.5
    assert means[True, 16] == pytest.approx(one_step / 4, rel=0.1)
    assert means[True, 256] == pytest.approx(one_step / 16, rel=0.15)
    assert means[False, 256] == pytest.approx(means[False, 16])
    assert means[False, 256] > 0.2


def coded_cache(folder: Path, profile: AnyProfile, train: int = 21, batch: int = 5) -> Cache:
    """A whole cache of a coded profile, its content a function of each window's place."""
    place = Place("train", 0, 8, 6)
    tables = fitted_tables(profile, given_arrays(profile, place, 0), place)
    spec, image = spec_with_tables(profile, tables, train)
    writer = CacheWriter(folder, spec, TOKENIZER_JSON, image)
    for shard in writer.missing_shards():
        shard_writer = writer.shard(shard)
        end = shard.first_window + shard.num_windows
        for first in range(shard.first_window, end, batch):
            rows = range(first, min(first + batch, end))
            shard_writer.append(window_content(spec, shard.split, rows))
        shard_writer.commit()
    writer.finish()
    return open_cache(folder)


def window_content(spec: CacheSpec, split: str, windows: range) -> dict[str, np.ndarray]:
    parts = []
    for window in windows:
        place = Place(split, window, 1, spec.context_length)
        seed = window + 1000 * (split == "validation")
        generator = np.random.default_rng(seed)
        others = {
            "input_ids": generator.integers(0, VOCAB, (1, spec.context_length + 1)).astype("<u2"),
            "teacher_entropy": generator.integers(0, 256, (1, spec.context_length)).astype("u1"),
            "label_log_prob": generator.integers(0, 256, (1, spec.context_length)).astype("u1"),
        }
        parts.append({**given_arrays(spec.profile, place, seed), **others})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_bytes_and_batches_do_not_depend_on_how_they_were_made(tmp_path: Path, name: str) -> None:
    """Written in batches of any size; read with any number of threads, in batches of any size, or one by one."""
    cache = coded_cache(tmp_path / "a", PROFILES[name], batch=5)
    coded_cache(tmp_path / "b", PROFILES[name], batch=2).close()
    for path in (tmp_path / "a").iterdir():
        assert sha256_of_file(path) == sha256_of_file(tmp_path / "b" / path.name), path.name
    whole = next(cache.stream("train", 21, seed=None, threads=1))
    check(cache.spec.profile, window_content(cache.spec, "train", range(21)), whole.target, Place("train", 0, 21, 6))
    for batch_size, threads in ((1, 1), (4, 3), (20, 8)):
        batches = list(cache.stream("train", batch_size, seed=None, threads=threads, drop_last=False))
        for array_name, array in whole.target.items():
            np.testing.assert_array_equal(np.concatenate([batch.target[array_name] for batch in batches]), array)
        entropy = np.concatenate([batch.signals["teacher_entropy"] for batch in batches])
        np.testing.assert_array_equal(entropy, whole.signals["teacher_entropy"])
    one = cache.window("train", 17)
    for array_name, array in one.target.items():
        np.testing.assert_array_equal(array[0], whole.target[array_name][17])
    assert (one.signals["label_log_prob"] <= 0).all()
    assert threading.active_count() < 20
    cache.close()


def test_golden_transform_cache_is_written_and_read_as_ever(tmp_path: Path) -> None:
    coded_cache(tmp_path, TRANSFORM, train=5).close()
    for path in sorted(GOLDEN.iterdir()):
        if path.suffix != ".npz":
            assert sha256_of_file(tmp_path / path.name) == sha256_of_file(path), path.name
    cache = open_cache(GOLDEN)
    (batch,) = cache.stream("train", 5, seed=None)
    with np.load(GOLDEN / "decoded.npz") as expected:
        assert set(expected) == set(batch.target)
        for name in expected:
            np.testing.assert_array_equal(batch.target[name], expected[name])


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    coded_cache(tmp_path, TRANSFORM).close()
    path = tmp_path / "tables.h5"
    content = path.read_bytes()
    for position in range(0, len(content), 997):
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CacheCorruptError, match=r"tables.h5: found fingerprint .*, expected .*cache repair"):
            open_cache(tmp_path)
    path.unlink()
    with pytest.raises(Exception, match=r"tables.h5: is missing; run `tristill cache repair`"):
        open_cache(tmp_path)


@pytest.mark.parametrize(
    ("profile", "need", "message"),
    [
        (SampledProfile(), Need("reverse_kl", 1.0), "reverse_kl is asked for, but this cache holds draws"),
        (
            SampledProfile(),
            Need("forward_kl", 2.0),
            "temperature 2 is asked for, but this sampled cache holds draws at 1",
        ),
        (TopKProfile(temperatures=(1.0, 2.0)), Need("forward_kl", 5.0), "this topk cache is exact at 1, 2 only"),
        (
            SampledProfile(),
            Need("mining by divergence", 1.0),
            "mining by divergence is asked for, but this cache holds",
        ),
        (
            SampledProfile(),
            Need("forward_kl", 1.0, None, "bucket"),
            "tail 'bucket' is asked for, but this cache holds draws",
        ),
        (SampledProfile(), Need("forward_kl", 1.0, 2.0), "every temperature between 1 and 2 is asked for"),
        (DenseProfile(width=8), Need("forward_kl", 1.0, None, "zero"), "this dense cache knows the whole distribution"),
        (TopKProfile(), Need("forward_kl", 1.0, None, "sampled"), "this topk cache holds no draws"),
        (TopKProfile(), Need("decoupled_kd of labels", 1.0), "does not know the probability of labels"),
        (
            TopKProfile(),
            Need("reverse_kl", 1.0, None, "zero"),
            "with tail 'zero', whose probabilities sum to less than",
        ),
        (TopKProfile(), Need("reverse_kl", 1.0, None, "renormalise"), "log(q / p) is infinite"),
        (TopKProfile(), Need("adaptive_kl", 1.0, None, "renormalise"), "log(q / p) is infinite"),
        (TopKProfile(temperatures=(1.0, 5.0)), Need("forward_kl", 5.0, 1.0), "every temperature between 5 and 1"),
        (TopKProfile(tail="nothing"), Need("forward_kl", 1.0, None, "bucket"), "has not kept its tail's mass"),
        (TopKProfile(tail="nothing"), Need("logit_mse", 1.0, None, "uniform"), "has not kept its tail's mass"),
        (TopKProfile(tail="nothing"), Need("forward_kl", 5.0), "knows nothing of its tail: a renormalised head above"),
    ],
)
def test_what_a_profile_does_not_serve_it_refuses_with_the_reason(
    profile: AnyProfile, need: Need, message: str
) -> None:
    assert message in str(profile.unserved(need, VOCAB))


def test_what_a_profile_serves_it_does_not_refuse() -> None:
    for profile in (TRANSFORM, DenseProfile(width=4)):
        for need in (Need("forward_kl", 1.0), Need("forward_kl", 7.3), Need("reverse_kl", 0.5)):
            assert profile.unserved(need, VOCAB) is None
    assert TopKProfile(temperatures=(1.0, 5.0)).unserved(Need("forward_kl", 5.0), VOCAB) is None
    assert SampledProfile(temperature=2.0).unserved(Need("forward_kl", 2.0), VOCAB) is None


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="temperatures must ascend and differ"):
        TopKProfile(temperatures=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"min_entries \(9\) is above max_entries \(3\)"):
        HeadSize(min_entries=9, max_entries=3)
    with pytest.raises(ValueError, match=r"basis_rank \(3\) is below rank \(7\)"):
        TransformProfile.model_validate({**TRANSFORM.model_dump(), "basis_rank": 3})
    with pytest.raises(ValueError, match=r"head\.max_entries is 9, but the vocabulary has only 5 entries"):
        PROFILES["topk"].arrays(5, 4)
    with pytest.raises(ValueError, match="profile topk is not part of format version 1"):
        make_spec(format_version=1, profile=TopKProfile(), tables_fingerprint="0" * 64)
    with pytest.raises(ValueError, match="tables_fingerprint must be there if and only if there are tables"):
        make_spec(profile=TopKProfile())


class Lying:
    """A sink that replaces what is written under one name, and passes the rest on."""

    def __init__(self, encoder: Encoder, name: str, value: int) -> None:
        self._encoder, self._name, self._value = encoder, name, value

    def write(self, name: str, values: np.ndarray, contexts: np.ndarray | int = 0) -> None:
        self._encoder.write(name, np.full_like(values, self._value) if name == self._name else values, contexts)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("topk", "head_count", 0, "holds heads of 0 to 0 entries, expected 1 to 9"),
        ("topk", "head_count", 11, "holds heads of 11 to 11 entries, expected 1 to 9"),
        ("topk", "head_id", 299, "holds id rank .*, expected ranks below 300"),
        ("topk", "tail", 15_000, "holds a tail beyond 60"),
        ("transform", "coefficient", 4101, "holds a coefficient beyond 2047 steps"),
        ("sampled", "draw_unique", 0, "holds 0 to 0 unique ids, expected 1 to 12"),
        ("sampled", "draw_unique", 13, "holds 13 to 13 unique ids, expected 1 to 12"),
        ("sampled", "draw_count", 11, "holds counts that sum to more than 12 draws"),
        ("sampled", "draw_id", 299, "holds id rank .*, expected ranks below 300"),
    ],
)
def test_integers_beyond_their_bounds_are_refused(kind: str, name: str, value: int, message: str) -> None:
    """What a checksum does not catch: a payload that was written to lie."""
    profile, place = PROFILES[kind], Place("train", 0, 2, 10)
    arrays = given_arrays(profile, place, 0)
    tables = fitted_tables(profile, arrays, place)
    assert profile.make_coder is not None
    coder = profile.make_coder(tables)
    models = {model: Model(tables[model]) for model in profile.models(VOCAB)}
    encoder = Encoder(models, 16)
    coder.write(arrays, place, Lying(encoder, name, value))
    with pytest.raises(CacheCorruptError, match=message):
        read_in_step([Decoder(models, np.frombuffer(encoder.finish(), np.uint8), 16)], [coder.read(place)])[0]


def test_ids_by_rank_must_be_a_permutation() -> None:
    place = Place("train", 0, 2, 10)
    for profile in (PROFILES["topk"], PROFILES["sampled"]):
        tables = fitted_tables(profile, given_arrays(profile, place, 0), place)
        for bad in (np.zeros(VOCAB, "<u2"), np.arange(1, VOCAB + 1).astype("<u2")):
            assert profile.make_coder is not None
            with pytest.raises(CacheCorruptError, match="ids_by_rank is no permutation"):
                profile.make_coder({**tables, "ids_by_rank": bad})


def forged_tables(folder: Path, change: object) -> None:
    """Edit tables.h5 and make every fingerprint agree, as an attacker would."""
    import json

    import h5py

    path = folder / "tables.h5"
    old = sha256_of_file(path)
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        change(file)  # type: ignore[operator]
    manifest = folder / "cache.json"
    manifest.write_text(manifest.read_text().replace(old, sha256_of_file(path)))
    json.loads(manifest.read_text())


def group_for_dataset(file: object) -> None:
    del file["target.mean"]  # type: ignore[attr-defined]
    file.create_group("target.mean")  # type: ignore[attr-defined]


def other_shape(file: object) -> None:
    del file["target.mean"]  # type: ignore[attr-defined]
    file.create_dataset("target.mean", shape=(10**6,), chunks=(10**6,), dtype="<f4")  # type: ignore[attr-defined]


def outside(file: object) -> None:
    del file["target.mean"]  # type: ignore[attr-defined]
    file.create_dataset("target.mean", shape=(VOCAB,), dtype="<f4", external=[("/etc/passwd", 0, 10**6)])  # type: ignore[attr-defined]


def bomb(file: object) -> None:
    import zstandard

    frame = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(10**7))
    file["target.mean"].id.write_direct_chunk((0,), frame)  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (group_for_dataset, "at table target.mean: .*is no dataset"),
        (other_shape, r"table target.mean has type, shape, chunk and filters .*1000000.*, expected"),
        (outside, "at table target.mean: has its bytes in other files"),
        (bomb, "table target.mean is not a frame of 1200 bytes with checksum"),
    ],
)
def test_hostile_tables_are_refused_before_they_are_read(tmp_path: Path, change: object, message: str) -> None:
    coded_cache(tmp_path, TRANSFORM).close()
    forged_tables(tmp_path, change)
    with pytest.raises(CacheCorruptError, match=message):
        open_cache(tmp_path)


def test_tables_that_are_a_link_or_a_pipe_are_refused(tmp_path: Path) -> None:
    import os

    coded_cache(tmp_path, TRANSFORM).close()
    path = tmp_path / "tables.h5"
    path.rename(tmp_path / "elsewhere.h5")
    path.symlink_to(tmp_path / "elsewhere.h5")
    with pytest.raises(CacheCorruptError, match=r"tables.h5: is a link, not a regular file"):
        open_cache(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CacheCorruptError, match=r"tables.h5: is not a regular file"):
        open_cache(tmp_path)


def test_a_spec_that_would_take_all_memory_for_its_models_is_refused() -> None:
    wide = TransformProfile.model_validate({**TRANSFORM.model_dump(), "rank": 9000, "basis_rank": 9000})
    with pytest.raises(ValueError, match=r"the models have \d+ contexts, expected at most 65536"):
        make_spec(70, 3, profile=wide, hidden=None, tables_fingerprint="0" * 64)
