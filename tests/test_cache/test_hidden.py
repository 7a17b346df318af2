"""Hidden states on disk: every coding gives back what it was given, and a spec cannot contradict itself."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from conftest import TOKENIZER_JSON, make_spec, window_arrays, write_shards
from tristill.cache import (
    Cache,
    CacheCorruptError,
    CacheRequestError,
    CacheSpec,
    CacheWriter,
    CodedLayer,
    HiddenSpec,
    Int8Hidden,
    PlainTopKProfile,
    Reduction,
    TransformHidden,
    open_cache,
)
from tristill.cache.calibration import Calibration
from tristill.cache.coding.frequencies import Model
from tristill.cache.coding.rans import Encoder
from tristill.cache.coding.streams import Histograms
from tristill.cache.hidden import NUM_ACTIVITIES
from tristill.cache.hidden_coder import LARGEST_COEFFICIENT, activity_edges
from tristill.cache.parts import Part, PartCoder
from tristill.cache.profiles.profile import NUM_LANES, Place
from tristill.cache.tables import tables_image

VOCAB, WIDTH = 300, 8


def transform_spec(ranks: tuple[int, ...] = (5, 8), *, stride: int = 1, delta: bool = True) -> HiddenSpec:
    coded = tuple(CodedLayer(step=0.5, rank=rank) for rank in ranks)
    layers = tuple(range(1, 2 * len(ranks), 2))
    return HiddenSpec(layers=layers, width=WIDTH, stride=stride, coding=TransformHidden(delta=delta, coded=coded))


def coefficients(part: Part, num_windows: int, spread: float, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).laplace(0, spread, (num_windows, *part.arrays[0].shape))
    return np.rint(values).clip(-LARGEST_COEFFICIENT, LARGEST_COEFFICIENT).astype("<i2")


def part_tables(part: Part, given: np.ndarray) -> dict[str, np.ndarray]:
    """Models fitted on what will be coded; the other tables are the stage's, and zero here."""
    assert part.coder is not None
    own = {table.name: np.zeros(table.shape, table.dtype) for table in part.tables}
    own["activity_edges"] = activity_edges(given.reshape(-1, given.shape[-1]), NUM_ACTIVITIES)
    histograms = Histograms(part.models)
    part.coder(own).write({part.name: given}, Place("train", 0, 1, 1), histograms)
    return {f"{part.name}.{name}": table for name, table in {**own, **histograms.frequencies()}.items()}


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, WIDTH),
    num_windows=st.integers(1, 5),
    context_length=st.integers(1, 40),
    stride=st.integers(1, 7),
    spread=st.sampled_from([0.01, 0.6, 20.0, 3000.0]),
)
def test_coefficients_come_back_exactly(
    rank: int, num_windows: int, context_length: int, stride: int, spread: float
) -> None:
    part = transform_spec((rank,), stride=stride).part(1, VOCAB, context_length)
    given_values = coefficients(part, num_windows, spread)
    assert given_values.shape == (num_windows, len(range(0, context_length, stride)), rank)
    coder = PartCoder(part, part_tables(part, given_values))
    place = Place("train", 3, num_windows, context_length)
    payload = coder.encode({part.name: given_values}, place)
    assert len(payload) <= part.capacity(num_windows, context_length)
    found = coder.decode(np.frombuffer(payload, np.uint8), place)
    assert found.keys() == {part.name}
    assert found[part.name].dtype == np.dtype("<i2")
    np.testing.assert_array_equal(found[part.name], given_values)


def test_activities_pay_where_positions_differ_in_size() -> None:
    """Half of the positions ten times as large as the others: a model per class takes fewer bytes than one for all."""
    part = transform_spec((8,)).part(1, VOCAB, 512)
    values = np.random.default_rng(0).laplace(0, 1, (4, 512, 8))
    values[:, ::2] *= 10
    given_values = np.rint(values).astype("<i2")
    place = Place("train", 0, 4, 512)
    sizes = []
    for edges in (None, np.full(NUM_ACTIVITIES - 1, 2**30, "<i4")):
        tables = part_tables(part, given_values)
        if edges is not None:  # all positions in one class
            histograms = Histograms(part.models)
            assert part.coder is not None
            part.coder({"activity_edges": edges}).write({part.name: given_values}, place, histograms)
            tables |= {f"{part.name}.{name}": table for name, table in histograms.frequencies().items()}
            tables[f"{part.name}.activity_edges"] = edges
        sizes.append(len(PartCoder(part, tables).encode({part.name: given_values}, place)))
    assert sizes[0] < 0.97 * sizes[1]


def test_coder_refuses_coefficients_beyond_its_models() -> None:
    part = transform_spec((2,)).part(1, VOCAB, 4)
    given_values = np.zeros((1, 4, 2), "<i2")
    tables = part_tables(part, given_values)
    coder = PartCoder(part, tables)
    place = Place("train", 0, 1, 4)
    given_values[0, 1, 1] = -LARGEST_COEFFICIENT - 1
    with pytest.raises(CacheRequestError, match=r"hidden_1: found a coefficient of 2048 steps, expected at most 2047"):
        coder.encode({part.name: given_values}, place)
    encoder = Encoder({name: Model(tables[f"{part.name}.{name}"]) for name in part.models}, NUM_LANES)
    encoder.write("activity", np.zeros(4, np.int64))
    encoder.write("coefficient", np.zeros(4, np.int64), 0)
    encoder.write("coefficient", np.array([0, 2 * LARGEST_COEFFICIENT + 1, 0, 0]), NUM_ACTIVITIES)
    with pytest.raises(CacheCorruptError, match="holds a coefficient beyond 2047 steps"):
        coder.decode(np.frombuffer(encoder.finish(), np.uint8), place)


def test_what_version_1_wrote_means_float16_at_every_position() -> None:
    found = HiddenSpec.model_validate({"layers": [2, 4], "width": 16})
    part = found.part(4, VOCAB, 10)
    assert [(array.name, array.shape, array.dtype) for array in part.arrays] == [("hidden_4", (10, 16), "<f2")]
    assert not part.stored_tables
    old = make_spec(format_version=1, profile=PlainTopKProfile(top_k=5), hidden=found)
    assert '"hidden":{"layers":[2,4],"width":16}' in old.to_json().replace(" ", "")
    assert CacheSpec.from_json(old.to_json(), "here") == old
    with pytest.raises(ValidationError, match="other than float16 at every position are not part of format version 1"):
        make_spec(format_version=1, profile=PlainTopKProfile(top_k=5), hidden=found.model_copy(update={"stride": 2}))


@pytest.mark.parametrize("stride", [1, 4])
def test_parts_have_the_shapes_of_the_format(stride: int) -> None:
    kept = {1: 10, 4: 3}[stride]
    reduced = HiddenSpec(
        layers=(1,), width=16, stride=stride, coding=Int8Hidden(reduction=Reduction(kind="pca", width=5))
    ).part(1, VOCAB, 10)
    assert [(array.name, array.shape, array.dtype) for array in reduced.arrays] == [
        ("hidden_1", (kept, 5), "|i1"),
        ("hidden_1_scale", (kept,), "<f2"),
    ]
    assert {table.name: table.shape for table in reduced.stored_tables} == {
        "hidden_1.mean": (16,),
        "hidden_1.basis": (5, 16),
    }
    spec = transform_spec((5, 8), stride=stride)
    first, second = (spec.part(layer, VOCAB, 10) for layer in spec.layers)
    assert [(array.name, array.shape, array.dtype) for array in first.arrays] == [("hidden_1", (kept, 5), "<i2")]
    assert "hidden_1.map" not in {table.name for table in first.stored_tables}
    assert "hidden_3.map" in {table.name for table in second.stored_tables}
    assert "hidden_3.map" not in {
        table.name for table in transform_spec((5, 8), delta=False).part(3, VOCAB, 10).stored_tables
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": [1, 1]}, r"hidden layers must be distinct and not negative, found \[1, 1\]"),
        (
            {"coding": {"kind": "transform", "delta": True, "coded": [{"step": 1, "rank": 2}]}},
            "found 1 coded layers, e",
        ),
        (
            {"coding": {"kind": "transform", "delta": True, "coded": [{"step": 1, "rank": 9}] * 2}},
            "found 9 dimensions of hidden states, expected at most their 8",
        ),
        (
            {"coding": {"kind": "int8", "reduction": {"kind": "seeded", "width": 9}}},
            "found 9 dimensions of hidden states, expected at most their 8",
        ),
        (
            {"coding": {"kind": "int8", "reduction": {"kind": "pca", "width": 2, "seed": 1}}},
            "found seed 1 with kind pca",
        ),
        ({"coding": {"kind": "int4"}}, "does not match any of the expected tags"),
        ({"coding": {"kind": "float16", "delta": True}}, "Extra inputs are not permitted"),
        ({"stride": 0}, "greater than or equal to 1"),
    ],
)
def test_a_spec_cannot_contradict_itself(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        HiddenSpec.model_validate({"layers": [1, 3], "width": WIDTH, **changes})


def test_a_layer_that_is_a_difference_needs_those_before_it() -> None:
    spec = transform_spec((1, 1, 1))
    assert spec.layers_to_read((3,)) == (1, 3)
    assert spec.layers_to_read((1,)) == (1,)
    assert spec.layers_to_read((5, 1)) == (1, 3, 5)
    assert spec.layers_to_read(()) == ()
    assert transform_spec((1, 1, 1), delta=False).layers_to_read((3,)) == (3,)


def cache_with_hidden(folder: Path, hidden: HiddenSpec, batch: int) -> Cache:
    profile = PlainTopKProfile(top_k=3)
    parts = [hidden.part(layer, VOCAB, 6) for layer in hidden.layers]
    tables: dict[str, np.ndarray] = {}
    for part in parts:
        if part.is_coded:
            tables |= part_tables(part, np.arange(-20, 20).repeat(part.arrays[0].shape[-1]).reshape(1, 40, -1))
    fingerprint, image = None, None
    if tables:
        draft = make_spec(21, 3, profile=profile, hidden=hidden, tables_fingerprint="0" * 64)
        calibration = Calibration(
            request="a test", student="none", positions=0, profile={}, target=None, points=(), chosen=None
        )
        image = tables_image(draft.tables, tables, calibration)
        fingerprint = hashlib.sha256(image).hexdigest()
    spec = make_spec(21, 3, profile=profile, hidden=hidden, tables_fingerprint=fingerprint)
    writer = CacheWriter(folder, spec, TOKENIZER_JSON, image)
    write_shards(writer, batch=batch)
    writer.finish()
    return open_cache(folder)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("coding", [Int8Hidden(), transform_spec().coding], ids=["int8", "transform"])
def test_bytes_and_batches_do_not_depend_on_how_they_were_made(
    tmp_path: Path, coding: Int8Hidden | TransformHidden, stride: int
) -> None:
    hidden = HiddenSpec(layers=(1, 3), width=WIDTH, stride=stride, coding=coding)
    cache = cache_with_hidden(tmp_path / "a", hidden, batch=5)
    cache_with_hidden(tmp_path / "b", hidden, batch=2).close()
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    expected = window_arrays(cache.spec, "train", range(21))
    whole = next(cache.stream("train", 21, seed=None, hidden_layers=(3,)))
    assert whole.hidden.keys() == {3}
    np.testing.assert_array_equal(whole.hidden[3], expected["hidden_3"])
    assert whole.hidden[3].shape[:2] == (21, 6 // stride)
    if isinstance(coding, Int8Hidden):
        np.testing.assert_array_equal(whole.hidden_scale[3], expected["hidden_3_scale"])
    else:
        assert not whole.hidden_scale
    one = cache.window("train", 17)
    for layer in (1, 3):
        np.testing.assert_array_equal(one.hidden[layer][0], expected[f"hidden_{layer}"][17])
    cache.close()
