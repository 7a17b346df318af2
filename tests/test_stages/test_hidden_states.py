"""Hidden states that a cache keeps: as near the teacher's as their coding says, and compared as online ones are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tristill.cache import (
    Float16Hidden,
    Float32Hidden,
    HiddenSpec,
    Int8Hidden,
    Reduction,
    TransformHidden,
    open_cache,
)
from tristill.stages.data.config import DataConfig
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.data.tokenized import split_windows
from tristill.stages.distill.choose import Places, choose_source
from tristill.stages.distill.config import DistillConfig, StudentConfig
from tristill.stages.distill.distill import distill
from tristill.stages.dump.calibrate import as_stored
from tristill.stages.dump.config import DumpConfig
from tristill.stages.dump.dump import dump_logits
from tristill.stages.dump.hidden import DEAD_ZONE_STEPS, hidden_arrays
from tristill.stages.dump.hidden_config import HiddenSettings, TransformHiddenSettings
from tristill.stages.dump.hidden_fit import FittedHidden, HiddenSample, HiddenWindows, fit_hidden, measure_hidden
from tristill.stages.errors import CheckpointError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.fidelity.hidden import hidden_fidelity
from tristill.stages.losses.hidden import HiddenLoss
from tristill.stages.losses.hidden_config import HiddenLossConfig
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.language_model import State
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.hidden import HiddenStates, HiddenTransforms
from tristill.stages.targets.source import Epoch, Signals
from tristill.stages.teacher.config import TeacherConfig
from tristill.stages.teacher.train import train_teacher

CPU = torch.device("cpu")
VOCAB, WIDTH, CONTEXT = 60, 12, 20
SHAPE = ModelConfig(width=16, layers=2, heads=2, mlp_width=24)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


EMBEDDING_VD = torch.randn(VOCAB, WIDTH, generator=generator(1))
SPECTRUM_D = torch.logspace(0, -1.5, WIDTH)


def made_up_windows(seed: int, num_windows: int) -> HiddenWindows:
    """Two layers with what makes real ones easy to code: they depend on the input id, and the second on the first."""
    ids_PT = torch.randint(0, VOCAB, (num_windows, CONTEXT), generator=generator(seed))
    own = [torch.randn(num_windows, CONTEXT, WIDTH, generator=generator(seed + n)) * SPECTRUM_D for n in (1, 2)]
    first = 3 + EMBEDDING_VD[ids_PT] + own[0]
    rotation_DD = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator(3))).Q
    return HiddenWindows({1: first, 2: first @ rotation_DD + 0.3 * own[1]}, ids_PT)


def made_up_sample(num_measured: int = 30) -> HiddenSample:
    measure = made_up_windows(20, num_measured)
    noise = {layer: torch.randn(states.shape, generator=generator(30)) for layer, states in measure.states.items()}
    student = {layer: states + 0.5 * noise[layer] for layer, states in measure.states.items()}
    return HiddenSample(
        fit=made_up_windows(10, 80),
        measure=measure,
        student=HiddenWindows(student, measure.input_ids_PT),
        embedding_VD=EMBEDDING_VD,
        total_positions=10**6,
    )


def stored_and_back(fitted: FittedHidden, windows: HiddenWindows) -> dict[int, torch.Tensor]:
    """Through the types of the format, without the entropy coder."""
    spec = fitted.spec
    arrays = hidden_arrays(spec, HiddenTransforms(spec, fitted.tables, CPU), windows.states, windows.input_ids_PT)
    by_name = {
        array.name: torch.from_numpy(as_stored(arrays[array.name].numpy(), array))
        for layer in spec.layers
        for array in spec.part(layer, VOCAB, CONTEXT).arrays
    }
    stored = {layer: by_name[f"hidden_{layer}"] for layer in spec.layers}
    scales = {layer: by_name[f"hidden_{layer}_scale"] for layer in spec.layers if spec.has_scales}
    return HiddenStates(spec, fitted.tables, CPU).states(stored, scales, windows.input_ids_PT, spec.layers)


def test_states_beyond_float16_are_kept_by_what_holds_them_and_refused_by_what_does_not() -> None:
    states = torch.randn(2, CONTEXT, WIDTH, generator=generator(0)) * 100
    states[0, 0, 3] = -1e5  # as residual streams of real models have it at their first position
    windows = HiddenWindows({4: states}, torch.zeros(2, CONTEXT, dtype=torch.int64))

    def through(coding: Float16Hidden | Float32Hidden | Int8Hidden) -> torch.Tensor:
        return stored_and_back(FittedHidden(HiddenSpec(layers=(4,), width=WIDTH, coding=coding), {}), windows)[4]

    assert torch.equal(through(Float32Hidden()), states)
    assert through(Int8Hidden())[0, 0, 3] == pytest.approx(-1e5, rel=1e-3)
    with pytest.raises(
        CheckpointError, match=r"layer 4: found a state of 100000, which float16 does not hold.*float32"
    ):
        through(Float16Hidden())
    states[1, 2, 0] = 1e7
    with pytest.raises(CheckpointError, match=r"layer 4: found a state beyond 8319008, .*float32"):
        through(Int8Hidden())


def test_a_transform_refuses_a_state_that_it_would_cut() -> None:
    fitted = fit_hidden(HiddenSettings(coding=TransformHiddenSettings()), made_up_sample())
    windows = made_up_windows(40, 4)
    windows.states[2][1, 5] *= 1e6
    with pytest.raises(CheckpointError, match=r"layer 2: found a state \S+ away .* codes at most 2047 of them; set"):
        stored_and_back(fitted, windows)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([0.05, 1.0, 300.0]), stride=st.integers(1, 5))
def test_plain_codings_err_by_half_a_unit_at_most(seed: int, size: float, stride: int) -> None:
    states = torch.randn(2, CONTEXT, WIDTH, generator=generator(seed)) * size
    windows = HiddenWindows({4: states}, torch.zeros(2, CONTEXT, dtype=torch.int64))
    kept = states[:, ::stride]
    for coding in (Float16Hidden(), Int8Hidden()):
        spec = HiddenSpec(layers=(4,), width=WIDTH, stride=stride, coding=coding)
        found = stored_and_back(FittedHidden(spec, {}), windows)[4]
        assert found.shape == kept.shape
        assert found.dtype == torch.float32
        largest = kept.abs().amax(dim=-1, keepdim=True)
        unit = kept.abs() * 2**-10 + 2**-24 if coding.kind == "float16" else (largest / 127).clamp(min=1e-6)
        # A scale is rounded to float16 first, so that the largest value may be clipped by 2^-11 of itself.
        assert ((found - kept).abs() <= 0.501 * unit + largest * 2**-11 * (coding.kind == "int8")).all()


def reference_states(
    fitted: FittedHidden, coefficients: dict[int, np.ndarray], ids: np.ndarray
) -> dict[int, np.ndarray]:
    """docs/format.md, section 6, one position at a time, in float64."""
    assert isinstance(fitted.spec.coding, TransformHidden)
    found = {layer: np.zeros((len(ids), fitted.spec.width)) for layer in fitted.spec.layers}
    for n, token in enumerate(ids):
        residual = np.zeros(fitted.spec.width)
        for layer, coded in zip(fitted.spec.layers, fitted.spec.coding.coded, strict=True):
            own = {name.split(".")[1]: t for name, t in fitted.tables.items() if name.startswith(f"hidden_{layer}.")}
            residual = residual @ own["map"].astype(float) if "map" in own else np.zeros(fitted.spec.width)
            residual[: coded.rank] += coefficients[layer][n]
            steps = own["table"][token] / 8 + residual
            found[layer][n] = own["mean"] + coded.step * steps @ (own["basis"] / 2**15)
    return found


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("stride", [1, 3])
def test_transformed_states_are_what_the_format_says(delta: bool, stride: int) -> None:
    sample = made_up_sample()
    coding = TransformHiddenSettings(relative_error=0.05, delta=delta)
    fitted = fit_hidden(HiddenSettings(coding=coding, stride=stride), sample)
    windows = sample.measure
    arrays = hidden_arrays(
        fitted.spec, HiddenTransforms(fitted.spec, fitted.tables, CPU), windows.states, windows.input_ids_PT
    )
    flat = {layer: arrays[f"hidden_{layer}"].flatten(0, 1).numpy() for layer in (1, 2)}
    ids_N = windows.input_ids_PT[:, ::stride].flatten()
    expected = reference_states(fitted, flat, ids_N.numpy())
    found = stored_and_back(fitted, windows)
    assert isinstance(fitted.spec.coding, TransformHidden)
    for layer, coded in zip((1, 2), fitted.spec.coding.coded, strict=True):
        np.testing.assert_allclose(found[layer].flatten(0, 1).numpy(), expected[layer], rtol=1e-4, atol=1e-4)
        # Every coefficient is within the dead zone of the truth, in directions that are orthonormal.
        basis = fitted.tables[f"hidden_{layer}.basis"][: coded.rank] / 2**15
        truth = windows.states[layer][:, ::stride].flatten(0, 1).numpy()
        error = (truth - expected[layer]) @ basis.T / coded.step
        assert np.abs(error).max() <= DEAD_ZONE_STEPS + 0.01


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("target", [0.02, 0.1])
def test_a_transform_meets_its_relative_error(target: float, delta: bool) -> None:
    sample = made_up_sample()
    fitted = fit_hidden(HiddenSettings(coding=TransformHiddenSettings(relative_error=target, delta=delta)), sample)
    found = stored_and_back(fitted, sample.measure)
    for layer, point in zip((1, 2), measure_hidden(fitted, sample), strict=True):
        true_ND = sample.measure.states[layer].flatten(0, 1)
        errors_N = (found[layer].flatten(0, 1) - true_ND).norm(dim=1) / true_ND.norm(dim=1)
        assert point.relative_error == pytest.approx(float(errors_N.mean()), rel=1e-5)
        assert 0.9 * target < point.relative_error <= target


def test_a_difference_takes_fewer_bytes_than_a_layer_by_itself() -> None:
    sample = made_up_sample(num_measured=400)
    points = {
        delta: measure_hidden(fit_hidden(HiddenSettings(coding=TransformHiddenSettings(delta=delta)), sample), sample)
        for delta in (True, False)
    }
    assert points[True][0].bytes_per_position == points[False][0].bytes_per_position
    assert points[True][1].bytes_per_position < 0.9 * points[False][1].bytes_per_position


def test_fitting_twice_gives_the_same_tables() -> None:
    fitted = [fit_hidden(HiddenSettings(coding=TransformHiddenSettings()), made_up_sample()) for _ in range(2)]
    assert fitted[0].spec == fitted[1].spec
    assert fitted[0].tables.keys() == fitted[1].tables.keys()
    for name, table in fitted[0].tables.items():
        np.testing.assert_array_equal(table, fitted[1].tables[name])


def test_ids_that_calibration_never_saw_are_predicted_from_their_embedding() -> None:
    """States that are a linear function of the embedding, of which half of the vocabulary is seen."""
    turn_DD = torch.randn(WIDTH, WIDTH, generator=generator(4))
    windows = []
    for seed, low, high in ((1, 0, VOCAB // 2), (2, VOCAB // 2, VOCAB)):
        ids_PT = torch.randint(low, high, (30, CONTEXT), generator=generator(seed))
        windows.append(HiddenWindows({1: EMBEDDING_VD[ids_PT] @ turn_DD}, ids_PT))
    sample = HiddenSample(windows[0], windows[1], windows[1], EMBEDDING_VD, 1000)
    fitted = fit_hidden(HiddenSettings(coding=TransformHiddenSettings()), sample)
    found = stored_and_back(fitted, windows[1])[1]
    states = HiddenStates(fitted.spec, fitted.tables, CPU)
    zeros = {1: torch.zeros(30, CONTEXT, fitted.spec.part(1, VOCAB, CONTEXT).arrays[0].shape[-1], dtype=torch.int16)}
    from_id_alone = states.states(zeros, {}, windows[1].input_ids_PT, (1,))[1]
    torch.testing.assert_close(from_id_alone, found, rtol=0, atol=0.5)
    assert (from_id_alone - windows[1].states[1]).norm() < 0.1 * windows[1].states[1].norm()


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_pca_keeps_what_lies_in_its_dimensions_and_random_directions_keep_their_share(kind: str) -> None:
    sample = made_up_sample()
    plane_KD = torch.linalg.qr(torch.randn(WIDTH, 4, generator=generator(5))).Q.T
    flat = [
        HiddenWindows({1: 2 + windows.states[1] @ plane_KD.T @ plane_KD}, windows.input_ids_PT)
        for windows in (sample.fit, sample.measure, sample.student)
    ]
    planar = HiddenSample(*flat, EMBEDDING_VD, 1000)
    errors = {}
    for reduction in (
        Reduction(kind="pca", width=4),
        Reduction(kind="pca", width=3),
        Reduction(kind="seeded", width=4),
        Reduction(kind="seeded", width=WIDTH),
    ):
        coding = Float16Hidden(reduction=reduction) if kind == "float16" else Int8Hidden(reduction=reduction)
        fitted = fit_hidden(HiddenSettings(coding=coding), planar)
        errors[reduction.kind, reduction.width] = measure_hidden(fitted, planar)[0].relative_error
        basis = fitted.tables["hidden_1.basis"] / 2**15
        np.testing.assert_allclose(basis @ basis.T, np.eye(reduction.width), atol=2e-4)
    rounding = 2e-3 if kind == "float16" else 2e-2
    assert errors["pca", 4] < rounding
    assert errors["seeded", WIDTH] < rounding
    assert errors["pca", 4] < errors["pca", 3] < errors["seeded", 4]
    other = fit_hidden(HiddenSettings(coding=Int8Hidden(reduction=Reduction(kind="seeded", width=4, seed=1))), planar)
    assert not np.array_equal(other.tables["hidden_1.basis"], fitted.tables["hidden_1.basis"][:4])


def test_the_angle_is_that_of_the_losses_gradient() -> None:
    student, true, stored = (torch.randn(50, 7, generator=generator(n)) for n in range(3))
    gradients = []
    for teacher in (stored, true):
        loss = HiddenLoss(HiddenLossConfig(layers={1: 1}, projection="always"), {1: 1}, 7, 7)
        state = State("residual", 1)
        loss({state: student[None]}, {state: teacher[None]}).backward()
        gradients.append(loss.projections["1"].grad.flatten().double())
    cosine = gradients[0] @ gradients[1] / gradients[0].norm() / gradients[1].norm()
    found = hidden_fidelity(student, true, stored)
    assert found.angle_deg == pytest.approx(float(torch.rad2deg(torch.acos(cosine))), rel=1e-4)
    assert found.norm_ratio == pytest.approx(float(gradients[0].norm() / gradients[1].norm()), rel=1e-4)
    assert found.relative_error == pytest.approx(
        float(np.mean([float((s - t).norm() / t.norm()) for s, t in zip(stored, true, strict=True)])), rel=1e-5
    )


def test_with_a_stride_the_loss_compares_the_kept_positions_alone() -> None:
    student = torch.randn(2, 7, 5, generator=generator(0))
    teacher = torch.randn(2, 7, 5, generator=generator(1))
    loss = HiddenLoss(HiddenLossConfig(layers={1: 3}), {1: 3}, 5, 5)
    own, theirs = State("residual", 1), State("residual", 3)
    expected = np.mean([(student[b, t] - teacher[b, t]).square().mean().item() for b in (0, 1) for t in (0, 3, 6)])
    assert float(loss({own: student}, {theirs: teacher[:, ::3]}, stride=3)) == pytest.approx(expected, rel=1e-6)


def test_refusals_say_what_to_do() -> None:
    sample = made_up_sample()
    with pytest.raises(
        CheckpointError, match=r"reduction\.width: found 13, but hidden states have 12 dimensions; choose fewer"
    ):
        fit_hidden(HiddenSettings(coding=Int8Hidden(reduction=Reduction(kind="pca", width=13))), sample)
    with pytest.raises(
        CheckpointError, match=r"relative_error: layer 1 comes to .* at best, expected 1e-06.*; ask for more, or keep"
    ):
        fit_hidden(HiddenSettings(coding=TransformHiddenSettings(relative_error=1e-6)), sample)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens and a teacher."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "corpus").mkdir()
    words = ["alpha", "beta", "gamma", "delta", "of", "and"]
    for n in range(60):
        (folder / "corpus" / f"{n}.txt").write_text(" ".join(np.random.default_rng(n).choice(words, 150)))
    data = {
        "source": {"kind": "text", "paths": [str(folder / "corpus")]},
        "tokenizer": {"kind": "bpe", "vocab_size": 270},
        "context_length": 12,
        "validation_fraction": 0.2,
    }
    tokenize_corpus(DataConfig.model_validate(data), folder / "data")
    settings = {"model": SHAPE.model_dump(), "training": {"steps": 20, "learning_rate": 1e-2, "batch_windows": 8}}
    train_teacher(TeacherConfig.model_validate(settings), folder / "data", folder / "teacher", EvaluateConfig())
    return folder


def dump_config(hidden: dict[str, object], layers: tuple[int, ...] = (0, 1, 2)) -> DumpConfig:
    settings = {"kind": "plain_topk", "top_k": 5}
    return DumpConfig.model_validate(
        {
            "profile": settings,
            "hidden_layers": layers,
            "hidden": hidden,
            "max_train_windows": 700,
            "shard_positions": 1024,
        }
    )


CODINGS: dict[str, tuple[dict[str, object], float]] = {
    "float16": ({"kind": "float16"}, 1e-2),
    "int8": ({"kind": "int8"}, 5e-2),
    "transform": ({"kind": "transform", "relative_error": 0.02}, 1e-1),
}


@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("coding", CODINGS)
def test_cached_and_online_hidden_losses_agree(run: Path, tmp_path: Path, coding: str, stride: int) -> None:
    """Over a short training, within the coding's own error; the cached run has neither teacher nor corpus."""
    settings, tolerance = CODINGS[coding]
    dump = dump_config({"coding": settings, "stride": stride})
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "cache")
    training = {"steps": 8, "learning_rate": 1e-2, "batch_windows": 8, "log_every": 1}
    losses = []
    for targets, home in (("cached", tmp_path / "gone"), ("online", run)):
        config = DistillConfig.model_validate(
            {"training": training, "targets": targets, "alpha": 1.0, "hidden": {"weight": 0.5, "layers": {"1": 2}}}
        )
        places = Places(cache=tmp_path / "cache", data=home / "data", teacher=home / "teacher")
        source = choose_source(config, dump, SHAPE.layers, places, CPU)
        (tmp_path / targets).mkdir()
        distill(config, StudentConfig(), SHAPE, source, CPU, tmp_path / targets, run / "teacher", EvaluateConfig(), {})
        log = [json.loads(line) for line in (tmp_path / targets / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["terms"]["hidden_mse"] for record in log])
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert min(losses[0]) > 0


@pytest.mark.parametrize("layers", [(2,), (1,), (0, 2)])
def test_a_source_gives_the_layers_asked_for_as_the_teacher_has_them(
    run: Path, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    """Layer 2 is a difference from layer 1, which is read for it, but not given."""
    dump = dump_config({"coding": {"kind": "transform", "relative_error": 0.01}, "stride": 2})
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "cache")
    source = CachedSource(open_cache(tmp_path / "cache"), CPU)
    states = tuple(State("residual", layer) for layer in layers)
    batch = next(source.batches("train", 300, Signals(states=states), Epoch()))
    assert tuple(batch.hidden) == states
    assert batch.hidden_stride == 2
    ids = torch.from_numpy(split_windows(run / "data", "train").read(list(range(300))).astype(np.int64))
    with torch.no_grad():
        expected = load_model(run / "teacher").eval()(ids[:, :-1], states).hidden
    for layer in states:
        true, found = expected[layer][:, ::2], batch.hidden[layer]
        assert found.shape == true.shape
        assert float(((found - true).norm(dim=-1) / true.norm(dim=-1)).mean()) < 0.02


def test_a_resumed_dump_has_the_bytes_of_one_that_was_not_interrupted(run: Path, tmp_path: Path) -> None:
    config = dump_config({"coding": {"kind": "transform", "delta": True}, "stride": 3})
    dump_logits(config, run / "data", run / "teacher", tmp_path / "cache")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    for name in ("cache.json", "train-00001.h5", "validation-00000.h5"):
        (tmp_path / "cache" / name).unlink()
    kept = (tmp_path / "cache" / "train-00000.h5").stat().st_ino
    dump_logits(config, run / "data", run / "teacher", tmp_path / "cache")
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert (tmp_path / "cache" / "train-00000.h5").stat().st_ino == kept
    assert "tables.h5" in whole
    manifest = json.loads(whole["cache.json"])
    assert [point["layer"] for point in manifest["calibration"]["hidden_points"]] == [0, 1, 2]
    assert manifest["calibration"]["hidden"] == manifest["spec"]["hidden"]
    assert all(point["relative_error"] <= 0.05 for point in manifest["calibration"]["hidden_points"])
    assert open_cache(tmp_path / "cache").verify() == []
