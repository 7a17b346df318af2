"""Coded profiles with content that their own writers could have been given, and what must come back of it."""

import hashlib

import numpy as np
import pytest

from conftest import make_spec
from tristill.cache import CacheSpec, SampledProfile, TopKProfile, TransformProfile
from tristill.cache.arrays import ids_dtype
from tristill.cache.calibration import Calibration
from tristill.cache.coding.streams import Histograms
from tristill.cache.profiles.heads import GAP_GROWTH, GAP_STEP, TAIL_STEP, HeadSize, gap_grid
from tristill.cache.profiles.profile import Place
from tristill.cache.spec import AnyProfile
from tristill.cache.tables import tables_image

VOCAB = 300
TRANSFORM = TransformProfile(
    step=0.25, width=12, rank=7, basis_rank=9, temperatures=(1.0, 2.0, 5.0), dither=True, head=HeadSize(max_entries=6)
)
PROFILES: dict[str, AnyProfile] = {
    "topk": TopKProfile(head=HeadSize(max_entries=9), temperatures=(1.0, 3.0)),
    "topk without tail": TopKProfile(head=HeadSize(max_entries=5), tail="nothing"),
    "sampled": SampledProfile(draws=12),
    "transform": TRANSFORM,
    "transform without dither": TRANSFORM.model_copy(update={"dither": False}),
}


def given_arrays(profile: AnyProfile, place: Place, seed: int, vocab_size: int = VOCAB) -> dict[str, np.ndarray]:
    """Content that the profile's own writer could have been given, extremes among it."""
    generator = np.random.default_rng(seed)
    shape = (place.num_windows, place.context_length)

    def distinct(width: int) -> np.ndarray:
        return np.stack([generator.choice(vocab_size, width, replace=False) for _ in range(np.prod(shape))])

    arrays: dict[str, np.ndarray] = {}
    if isinstance(profile, SampledProfile):
        counts = generator.multinomial(profile.draws, [1 / profile.draws] * profile.draws, np.prod(shape))
        counts = -np.sort(-counts, axis=1)
        arrays = {
            "draw_unique": (counts > 0).sum(axis=1),
            "draw_ids": distinct(profile.draws),
            "draw_counts": counts,
        }
    else:
        assert isinstance(profile, TopKProfile | TransformProfile)
        width = profile.head.max_entries
        gaps = np.sort(generator.exponential(4.0, (np.prod(shape), width)), axis=1)
        gaps[:, 0] = 0
        gaps[0, -1] = 6e4
        arrays = {
            "head_count": generator.integers(profile.head.min_entries, width + 1, np.prod(shape)),
            "head_ids": distinct(width),
            "head_logits": -gaps,
        }
        if not (isinstance(profile, TopKProfile) and profile.tail == "nothing"):
            tails = generator.normal(0, 4, (np.prod(shape), len(profile.temperatures)))
            tails[0], tails[1] = -np.inf, 59.9
            arrays["tail_logsumexp"] = tails
        if isinstance(profile, TransformProfile):
            arrays["coefficients"] = generator.standard_t(2, (np.prod(shape), profile.rank)) * 3
            arrays["coefficients"][0, 0] = 6e4
    specs = profile.arrays(vocab_size, place.context_length)
    return {spec.name: arrays[spec.name].astype(spec.dtype).reshape(*shape, *spec.shape[1:]) for spec in specs}


def fitted_tables(
    profile: AnyProfile, arrays: dict[str, np.ndarray], place: Place, vocab_size: int = VOCAB
) -> dict[str, np.ndarray]:
    """All tables and models, the ones that no coder looks at filled with small numbers."""
    generator = np.random.default_rng(5)
    tables = {}
    for spec in profile.tables(vocab_size):
        values = generator.normal(size=spec.shape)
        tables[spec.name] = (values * 100 if spec.dtype == "<i2" else values).astype(spec.dtype)
    tables["ids_by_rank"] = generator.permutation(vocab_size).astype(ids_dtype(vocab_size))
    if "tail_logsumexp" in arrays:
        tables["tail_predictor"] = np.full((arrays["tail_logsumexp"].shape[-1], 3), 20_000, "<i4")
    histograms = Histograms(profile.models(vocab_size))
    assert profile.make_coder is not None
    profile.make_coder(tables).write(arrays, place, histograms)
    return {**tables, **histograms.frequencies()}


def sets_of(ids: np.ndarray, values: np.ndarray, counts: np.ndarray) -> list[dict[int, float]]:
    flat = zip(ids.reshape(-1, ids.shape[-1]), values.reshape(-1, ids.shape[-1]), counts.ravel(), strict=True)
    return [dict(zip(row[:n].tolist(), value[:n].tolist(), strict=True)) for row, value, n in flat]


def check(profile: AnyProfile, given: dict[str, np.ndarray], found: dict[str, np.ndarray], place: Place) -> None:
    for spec in profile.arrays(VOCAB, place.context_length):
        assert found[spec.name].shape == given[spec.name].shape
    if isinstance(profile, SampledProfile):
        assert sets_of(given["draw_ids"], given["draw_counts"], given["draw_unique"]) == sets_of(
            found["draw_ids"], found["draw_counts"], found["draw_unique"]
        )
        assert (found["draw_counts"].sum(axis=-1) == profile.draws).all()
        return
    np.testing.assert_array_equal(found["head_count"], given["head_count"])
    before = sets_of(given["head_ids"], given["head_logits"], given["head_count"])
    after = sets_of(found["head_ids"], found["head_logits"], found["head_count"])
    for one, other in zip(before, after, strict=True):
        assert one.keys() == other.keys()
        assert sum(logit == 0 for logit in other.values()) == 1
        for token, logit in one.items():
            gap = min(-logit, float(gap_grid()[-1]))
            step = GAP_STEP + GAP_GROWTH * gap
            tolerance = GAP_STEP + 0.01 if gap < GAP_STEP / 2 else 0.52 * step
            assert -other[token] == pytest.approx(gap, abs=tolerance), "half a step; only the largest has gap zero"
    if "tail_logsumexp" in given:
        np.testing.assert_allclose(
            found["tail_logsumexp"], given["tail_logsumexp"], atol=TAIL_STEP / 2 + 0.02, rtol=1e-3
        )
    if isinstance(profile, TransformProfile):
        error = found["coefficients"].astype(float) - given["coefficients"].astype(float)
        small = np.abs(given["coefficients"]) < 100
        assert np.abs(error[small]).max() <= 0.5 + 0.05, "half a step, and the rounding of float16"
        assert found["coefficients"].reshape(-1, profile.rank)[0, 0] == pytest.approx(2047, abs=1), "saturated"


def spec_with_tables(profile: AnyProfile, tables: dict[str, np.ndarray], train: int) -> tuple[CacheSpec, bytes]:
    draft = make_spec(train, 3, profile=profile, hidden=None, tables_fingerprint="0" * 64)
    calibration = Calibration(
        request="a test", student="none", positions=0, profile={}, target=None, points=(), chosen=None
    )
    image = tables_image(draft.tables, {f"target.{name}": table for name, table in tables.items()}, calibration)
    return draft.model_copy(update={"tables_fingerprint": hashlib.sha256(image).hexdigest()}), image
