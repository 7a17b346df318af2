"""Quantisation that is turned on over the first steps, SubLN that is put into a trained model, and trits in the log."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from small_training import CPU, SHAPE, distill_config, dump_config, make_run, places, student_of

from tristill.stages.distill.choose import choose_source
from tristill.stages.distill.config import StudentConfig
from tristill.stages.distill.distill import distill, model_size
from tristill.stages.distill.health import TernaryHealth
from tristill.stages.distill.moving_teacher import CoTraining
from tristill.stages.distill.start import start_from
from tristill.stages.dump.dump import dump_logits
from tristill.stages.errors import StageError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.quantized_linear import QuantizedLinear
from tristill.stages.models.transformer import SubNorm, Transformer, fit_to_inputs
from tristill.stages.quantize.config import QuantizeConfig, WarmupConfig, quantization_strength
from tristill.stages.targets.source import Epoch, Signals
from tristill.stages.training.loop import StepInfo

SUBLN = SHAPE.model_copy(update={"subln": True})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"))
    dump_logits(dump_config(), folder / "data", folder / "teacher", folder / "cache")
    return folder


def test_strength_rises_from_zero_to_one_as_its_kind_says() -> None:
    for step in range(14):
        t = min(1.0, step / 10)
        expected = {"linear": t, "cosine": 0.5 - 0.5 * math.cos(math.pi * t), "step": float(step >= 10)}
        for kind, strength in expected.items():
            config = WarmupConfig.model_validate({"steps": 10, "kind": kind})
            assert quantization_strength(config, step) == pytest.approx(strength)
    assert quantization_strength(None, 0) == 1


@pytest.mark.parametrize("code", ["absmean", "learned", "nbit"])
@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_a_layer_mixes_full_precision_and_codes(code: str, strength: float) -> None:
    bits = 3 if code == "nbit" else None
    layer = QuantizedLinear(8, 5, QuantizeConfig.model_validate({"weights": code, "bits": bits}))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    quantized = layer.quantized_weight().detach()
    x_codes = layer.quantized_input(x)
    layer.strength = strength
    weight = layer.weight.detach()
    expected = (x + strength * (x_codes - x)) @ (weight + strength * (quantized - weight)).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_with_quantisation_off_a_student_from_a_teacher_computes_its_logits_with_subln_too(run: Path) -> None:
    teacher = load_model(run / "teacher")
    ids = torch.randint(0, 270, (3, 12), generator=torch.Generator().manual_seed(5))
    student = Transformer(SUBLN, teacher.vocab_size, QuantizeConfig())
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected
    assert len(missing) == 2 * SHAPE.layers
    with torch.no_grad():
        student.quantize_by(0)
        assert torch.equal(student.logits(ids), teacher.logits(ids))
        fit_to_inputs(student, lambda: student(ids))
        assert torch.equal(student.logits(ids), teacher.logits(ids))


def test_subln_is_fitted_by_least_squares_and_leaves_dead_inputs_alone() -> None:
    x = (
        torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        * torch.arange(8)
        * torch.linspace(1, 3, 50)[:, None]
    )
    norm = SubNorm(8, eps=1e-5)
    unfitted = (norm(x) - x).square().sum(dim=0)
    fit_to_inputs(norm, lambda: norm(x))
    weight = norm.weight.detach().clone()
    assert float(weight[0]) == 1  # this input is always zero
    errors = {}
    with torch.no_grad():
        for factor in (0.98, 1.0, 1.02):
            norm.weight.copy_(weight * factor)
            errors[factor] = (norm(x) - x).square().sum(dim=0)
    assert (errors[1.0][1:] < errors[0.98][1:]).all()
    assert (errors[1.0][1:] < errors[1.02][1:]).all()
    assert (errors[1.0][1:] < unfitted[1:]).all()


def test_distil_puts_subln_into_a_student_that_starts_from_a_teacher_without(run: Path, tmp_path: Path) -> None:
    student = StudentConfig(model=SUBLN, init="teacher", quantize=QuantizeConfig(warmup=WarmupConfig(steps=6)))
    summary, records = student_of(run, run / "cache", tmp_path / "s", distill_config(), dump_config(), student)
    # At its first step, quantisation off, it is the teacher: a copy that is not quantised at all has the same loss.
    plain = StudentConfig(init="teacher", quantize=QuantizeConfig(weights="none", activations="none"))
    _, copied = student_of(run, run / "cache", tmp_path / "copy", distill_config(), dump_config(), plain)
    assert records[0]["loss"] == copied[0]["loss"]
    assert records[1]["loss"] != copied[1]["loss"]
    again = load_model(tmp_path / "s")
    assert again.config.subln
    assert all(layer.strength == 1 for layer in again.quantized_linears().values())
    assert summary.train.steps == 12


def test_resumed_equals_uninterrupted_across_the_warm_up(run: Path, tmp_path: Path) -> None:
    student = StudentConfig(quantize=QuantizeConfig(warmup=WarmupConfig(steps=8, kind="cosine")))
    config, dump = distill_config(), dump_config()
    student_of(run, run / "cache", tmp_path / "whole", config, dump, student)

    class SourceError(Exception):
        pass

    source = choose_source(config, dump, SHAPE.layers, places(run, run / "cache"), CPU)
    plain_batches, seen = source.batches, 0

    def failing(*arguments: object, **more: object):  # type: ignore[no-untyped-def]
        nonlocal seen
        for batch in plain_batches(*arguments, **more):  # type: ignore[arg-type]
            seen += 1
            if seen > 7:
                raise SourceError
            yield batch

    source.batches = failing  # type: ignore[method-assign]
    folder = tmp_path / "cut"
    folder.mkdir()
    with pytest.raises(SourceError):
        distill(config, student, SHAPE, source, CPU, folder, run / "teacher", EvaluateConfig(), {})
    source.batches = plain_batches  # type: ignore[method-assign]
    distill(config, student, SHAPE, source, CPU, folder, run / "teacher", EvaluateConfig(), {"cache": "x"})
    logs = [(place / "metrics.jsonl").read_text().splitlines() for place in (tmp_path / "whole", folder)]
    health = [[{key: json.loads(line)[key] for key in ("flips", "zeros", "scale")} for line in log] for log in logs]
    assert health[0] == health[1]
    whole, resumed = load_model(tmp_path / "whole"), load_model(folder)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("code", ["absmean", "twn", "seq"])
def test_health_is_what_its_words_say(code: str) -> None:
    student = Transformer(SHAPE, 40, QuantizeConfig.model_validate({"weights": code, "layers": ["*.q_proj"]}))
    student.initialize(torch.Generator().manual_seed(0))
    health = TernaryHealth(student)
    name, layer = next(iter(student.quantized_linears().items()))
    before = layer.ternary()
    first = health.look(0)
    assert set(first) == {"zeros", "flips", "to_boundary", "scale"}
    assert list(first["zeros"]) == list(student.quantized_linears())
    assert first["flips"][name] == 0
    with torch.no_grad():
        layer.weight[:3] *= -1
    after = layer.ternary()
    found = health.look(10)
    changed = [int(a) != int(b) for a, b in zip(before.trits_OI.flatten(), after.trits_OI.flatten(), strict=True)]
    assert found["flips"][name] == pytest.approx(sum(changed) / len(changed))
    assert health.look(10) is found
    assert found["zeros"][name] == pytest.approx(sum(int(t) == 0 for t in after.trits_OI.flatten()) / 256)
    scale = float(after.scale_RG)
    assert found["scale"][name] == pytest.approx(scale)
    largest_zero = max(
        abs(float(w)) for w, t in zip(layer.weight.detach().flatten(), after.trits_OI.flatten(), strict=True) if t == 0
    )
    boundary = {"absmean": scale / 2, "twn": float(layer.weight.detach().abs().mean()) * 0.7, "seq": scale / 2}[code]
    assert largest_zero <= boundary
    distances = [abs(abs(float(w)) - boundary) / scale for w in layer.weight.detach().flatten()]
    assert found["to_boundary"][name] == pytest.approx(sum(distances) / len(distances), rel=1e-5)


def test_a_warning_names_a_dead_layer_and_a_frozen_one_once(capsys: pytest.CaptureFixture[str]) -> None:
    student = Transformer(SHAPE, 40, QuantizeConfig(layers=("*.0.self_attn.[qk]_proj",)))
    student.initialize(torch.Generator().manual_seed(0))
    health = TernaryHealth(student)
    query, key = student.quantized_linears().values()
    with torch.no_grad():
        query.weight.zero_()
    for step in range(0, 90, 10):
        health.look(step)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("warning: model.layers.0.self_attn.q_proj is dead, all its weights are zero; raise")
    assert said[1].startswith("warning: model.layers.0.self_attn.k_proj is frozen, none of its trits changed in 5 logs")
    with torch.no_grad():
        key.weight.mul_(-1)
    health.look(90)
    assert not capsys.readouterr().err


def test_the_log_of_a_student_has_the_health_of_every_layer(run: Path, tmp_path: Path) -> None:
    _, records = student_of(run, run / "cache", tmp_path / "s", distill_config(), dump_config())
    names = list(load_model(tmp_path / "s").quantized_linears())
    for record in records:
        for what in ("zeros", "flips", "to_boundary", "scale"):
            assert list(record[what]) == names  # type: ignore[call-overload]
    assert any(flips > 0 for flips in records[-1]["flips"].values())  # type: ignore[attr-defined]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_compiled_student_trains_as_an_eager_one_through_a_warm_up(run: Path, tmp_path: Path) -> None:
    student = StudentConfig(quantize=QuantizeConfig(warmup=WarmupConfig(steps=3)))
    training = {"steps": 6, "learning_rate": 1e-2, "batch_windows": 8, "log_every": 1}
    found = {}
    for is_compiled in (False, True):
        config = distill_config(training={**training, "compile": is_compiled})
        _, found[is_compiled] = student_of(
            run, run / "cache", tmp_path / str(is_compiled), config, dump_config(), student
        )
    for eager, compiled in zip(found[False], found[True], strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-3)
    assert list(load_model(tmp_path / "True").state_dict()) == list(load_model(tmp_path / "False").state_dict())


def test_compiling_without_a_compiler_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = distill_config(training={"steps": 2, "learning_rate": 1e-2, "batch_windows": 8, "compile": True})
    with pytest.raises(
        StageError, match=r"training.compile: found no C\+\+ compiler \(no-such-compiler\), which torch.c"
    ):
        student_of(run, run / "cache", tmp_path / "s", config, dump_config())


def test_a_moving_average_of_the_student_is_quantised_as_much_as_the_student(run: Path) -> None:
    config = distill_config(targets="online", online={"ema": 0.9, "ema_of": "student"})
    source = choose_source(config, dump_config(), SHAPE.layers, places(run, run / "cache"), CPU)
    student = Transformer(SHAPE, 270, QuantizeConfig(warmup=WarmupConfig(steps=4)))
    student.initialize(torch.Generator().manual_seed(0))
    learner = CoTraining.of(student, config, source, SHAPE, CPU)
    average = learner.moving.average
    assert average is not None
    batch = next(source.batches("train", 2, learner.signals, Epoch()))
    for step, strength in ((0, 0.0), (1, 0.25), (4, 1.0)):
        learner.forward(batch, StepInfo(step))
        for model in (student, average):
            assert {layer.strength for layer in model.quantized_linears().values()} == {strength}


@pytest.mark.parametrize(("code", "keeps"), [("learned", True), ("seq", False), ("absmean", False)])
def test_a_student_that_starts_from_a_student_takes_its_learned_steps_where_they_mean_the_same(
    run: Path, tmp_path: Path, code: str, *, keeps: bool
) -> None:
    first = StudentConfig(quantize=QuantizeConfig(weights="learned"))
    student_of(run, run / "cache", tmp_path / "first", distill_config(), dump_config(), first)
    second = Transformer(SHAPE, 270, QuantizeConfig.model_validate({"weights": code}))
    second.initialize(torch.Generator().manual_seed(0))
    source = choose_source(distill_config(), dump_config(), SHAPE.layers, places(run, run / "cache"), CPU)
    start_from(second, tmp_path / "first", source)
    taught = load_model(tmp_path / "first")
    for name, layer in taught.quantized_linears().items():
        own = second.quantized_linears()[name]
        assert torch.equal(own.weight, layer.weight)
        assert torch.equal(own.ternary().scale_RG, layer.ternary().scale_RG) == keeps


def test_a_quantised_head_that_shares_the_embedding_adds_to_what_is_packed() -> None:
    def packed_bytes(layers: tuple[str, ...], *, tied: bool) -> int:
        shape = SHAPE.model_copy(update={"tied_embeddings": tied})
        return model_size(Transformer(shape, 100, QuantizeConfig(layers=layers))).packed_bytes

    blocks, head = ("model.layers.*",), ("model.layers.*", "lm_head")
    trits, scale = 100 * SHAPE.width * 2 // 8, 2
    assert packed_bytes(head, tied=True) - packed_bytes(blocks, tied=True) == trits + scale
    assert packed_bytes(head, tied=False) - packed_bytes(blocks, tied=False) == trits + scale - 2 * 100 * SHAPE.width


def test_subln_of_random_first_weights_begins_where_it_changes_least_too(run: Path, tmp_path: Path) -> None:
    config = distill_config(training={"steps": 1, "learning_rate": 1e-12, "batch_windows": 8})
    student_of(run, run / "cache", tmp_path / "s", config, dump_config(), StudentConfig(model=SUBLN))
    found = load_model(tmp_path / "s")
    source = choose_source(config, dump_config(), SHAPE.layers, places(run, run / "cache"), CPU)
    batch = next(source.batches("train", 1, Signals(), Epoch()))
    expected = Transformer(SUBLN, 270)
    expected.load_state_dict(found.state_dict())
    expected.quantize_by(0)
    fit_to_inputs(expected, lambda: expected(batch.input_ids_BT))
    for one, other in zip(found.modules(), expected.modules(), strict=True):
        if isinstance(one, SubNorm):
            torch.testing.assert_close(one.weight, other.weight)  # type: ignore[union-attr]
            assert (one.weight < 0.9).any()
