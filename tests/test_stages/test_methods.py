"""Every method through the real training: cached equals online, resumed equals uninterrupted, refusals say why."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import CPU, SHAPE, distill_config, dump_config, make_run, student_from, student_of

from tristill.cache import SplitName, open_cache
from tristill.stages.distill.config import StudentConfig
from tristill.stages.distill.curriculum import pacing_of
from tristill.stages.dump.dump import dump_logits
from tristill.stages.errors import TargetsError
from tristill.stages.losses.chunked_head import chunked_head_loss
from tristill.stages.losses.cross_entropy import CrossEntropy
from tristill.stages.losses.selection_config import CurriculumConfig
from tristill.stages.losses.term import WeightedTerm
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.language_model import State
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.online import OnlineSource
from tristill.stages.targets.source import Epoch, Signals, TargetBatch, endless_batches
from tristill.stages.training.loop import Training

WHOLE = {"kind": "plain_topk", "top_k": 270, "logit_dtype": "float32"}
KINDS: dict[str, dict[str, Any]] = {
    "forward_kl": {"temperature": 2.0},
    "reverse_kl": {"temperature": 2.0},
    "jensen_shannon": {"beta": 0.3},
    "skew_forward_kl": {},
    "skew_reverse_kl": {},
    "adaptive_kl": {},
    "total_variation": {},
    "decoupled_kd": {"of": "top1"},
    "logit_mse": {},
    "ranking": {},
    "top1_hinge": {},
}


class UnpluggedSource(OnlineSource):
    """Fails after seven training batches."""

    def batches(self, split: SplitName, batch_windows: int, signals: Signals, epoch: Epoch) -> Iterator[TargetBatch]:
        found = super().batches(split, batch_windows, signals, epoch)
        yield from islice(found, 7 if split == "train" else None)
        if split == "train":
            raise RuntimeError("pulled the plug")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the whole vocabulary in float32, and of queries, keys and values."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    dump_logits(
        dump_config(profile=WHOLE, hidden_layers=[1, 2], hidden={"output": "qkv"}),
        run / "data",
        run / "teacher",
        folder,
    )
    return folder


def trace(
    run: Path, cache: Path, folder: Path, student: StudentConfig | None = None, **changes: Any
) -> list[dict[str, Any]]:
    hidden = {"output": "qkv"} if "relations" in changes else {}
    dump = dump_config(profile=WHOLE, hidden_layers=[1, 2], hidden=hidden)
    return student_of(run, cache, folder, distill_config(**changes), dump, student)[1]


def without_speeds(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "positions_per_s"} for line in log]


def assert_equal_traces(run: Path, cache: Path, tmp_path: Path, rel: float = 3e-4, **changes: Any) -> None:
    cached, online = (trace(run, cache, tmp_path / kind, targets=kind, **changes) for kind in ("cached", "online"))
    assert len(cached) == 12
    for a, b in zip(cached, online, strict=True):
        for key in ("loss", "terms", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=rel, abs=1e-6), f"{key} at step {a['step']}"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_term_from_a_cache_of_all_logits_is_that_of_online_targets(
    run: Path, whole: Path, tmp_path: Path, kind: str
) -> None:
    losses = [{"kind": "cross_entropy", "weight": 0.5}, {"kind": kind, "weight": 0.5, **KINDS[kind]}]
    # Where signs and orders decide, ties and rounding may decide otherwise.
    assert_equal_traces(run, whole, tmp_path, losses=losses, rel=2e-2 if kind == "ranking" else 1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"mining": {"fraction": 0.4, "by": "divergence"}},
        {"entropy_weights": {"power": 0.5}},
        {
            "temperature": {"kind": "linear", "start": 4.0, "end": 1.0},
            "alpha": {"kind": "cosine", "start": 1, "end": 0.2},
        },
        {"balance": {"every": 3}},
        {"relations": {"layers": "all", "heads": 2, "weight": 0.3}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_selections_schedules_and_relations_from_a_cache_are_those_of_online_targets(
    run: Path, whole: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert_equal_traces(run, whole, tmp_path, rel=2e-2 if "relations" in changes else 2e-3, **changes)


@pytest.mark.parametrize("output", ["attention", "mlp"])
@pytest.mark.parametrize("coding", [{"kind": "float16"}, {"kind": "transform", "relative_error": 0.01}])
def test_outputs_of_attention_and_mlp_from_a_cache_are_those_of_the_teacher(
    run: Path, tmp_path: Path, output: str, coding: dict[str, Any]
) -> None:
    dump = dump_config(profile={"kind": "dense"}, hidden_layers=[1, 2], hidden={"output": output, "coding": coding})
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "cache")
    source = CachedSource(open_cache(tmp_path / "cache"), CPU)
    states = (State(output, 1), State(output, 2))  # type: ignore[arg-type]
    batch = next(source.batches("train", 50, Signals(states=states), Epoch()))
    with torch.no_grad():
        expected = load_model(run / "teacher").eval()(batch.input_ids_BT, states).hidden
    for state in states:
        difference = batch.hidden[state] - expected[state]
        assert float((difference.norm(dim=-1) / expected[state].norm(dim=-1)).mean()) < 0.02
    hidden = {"layers": "all", "output": output, "kind": "cosine"}
    log = trace(run, tmp_path / "cache", tmp_path / "student", targets="cached", hidden=hidden)
    assert log[-1]["terms"]["hidden_cosine"] < log[0]["terms"]["hidden_cosine"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relations": {"layers": "all", "heads": 3}}, r"relations.heads: found 3, expected a divisor of every width"),
        ({"hidden": {"layers": "all"}}, "hidden states of kind 'residual' are asked for, but the cache holds those of"),
        (
            {"hidden": {"layers": {1: 1, 3: 2}, "output": "residual"}, "targets": "online"},
            r"found student layers \[3\]",
        ),
        ({"hidden": {"layers": {1: 9}}, "targets": "online"}, r"found teacher layers \[9\], but of the teacher there"),
        (
            {"tail": "zero", "targets": "online"},
            "distill.tail: tail 'zero' is asked for, but a teacher that is forwarded",
        ),
        ({"curriculum": {}, "targets": "online"}, "distill.curriculum: needs the teacher's entropies of all windows"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    run: Path, whole: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TargetsError, match=message):
        trace(run, whole, tmp_path / "student", **{"targets": "cached", **changes})
    assert not (tmp_path / "student" / "metrics.jsonl").exists()


def test_a_curriculum_shows_easy_windows_first_and_resumes_in_its_middle(
    run: Path, whole: Path, tmp_path: Path
) -> None:
    source = CachedSource(open_cache(whole), CPU)
    training = distill_config().training.model_copy(update={"steps": 200})
    curriculum = {"by": "confidence", "start": 0.1, "until": 1.0, "pacing": "linear"}
    pacing = pacing_of(CurriculumConfig.model_validate(curriculum), training, source)
    label_log_prob = source.mean_signals("train")["label_log_prob"]
    assert pacing.rank_W[label_log_prob.argmax()] < len(label_log_prob) // 20
    order = source.batches("train", source.num_windows("train"), Signals(), Epoch())
    rank_of: dict[tuple[int, ...], int] = {}  # windows may repeat
    for number, ids in enumerate(next(order).input_ids_BT):
        key, rank = tuple(ids.tolist()), int(pacing.rank_W[number])
        rank_of[key] = min(rank, rank_of.get(key, rank))
    make = endless_batches(source, 8, Signals(targets=True), 3, pacing)
    means = []
    for number, batch in zip(range(200), make(0), strict=False):
        ranks = [rank_of[tuple(ids.tolist())] for ids in batch.input_ids_BT]
        assert max(ranks) < max(8, math.ceil(pacing.share(number) * len(pacing.rank_W)))
        means.append(sum(ranks))
    assert sum(means[:20]) < sum(means[-20:]) / 3
    for first in (1, 57, 130):
        again, expected = next(make(first)), None
        for number, batch in enumerate(make(0)):
            if number == first:
                expected = batch
                break
        assert expected is not None
        torch.testing.assert_close(again.input_ids_BT, expected.input_ids_BT)
    log = trace(run, whole, tmp_path / "student", targets="cached", curriculum={"by": "confidence"})
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_co_trained_teacher_is_the_teacher_trained_alone(run: Path, tmp_path: Path, precision: str) -> None:
    """Neither model moves the other: gradients, clipping and learning rates are apart."""
    online = {"co_train": True, "learning_rate": 5e-3}
    training = distill_config().training.model_copy(update={"precision": precision})
    trace(run, tmp_path, tmp_path / "student", targets="online", online=online, alpha=0.3, training=training)
    config = training.model_copy(update={"learning_rate": 5e-3})
    source = OnlineSource(run / "data", CPU, max_train_windows=700)
    alone = Transformer(SHAPE, source.vocab_size)
    alone.initialize(torch.Generator().manual_seed(config.seed))

    def loss(batch: Any, info: Any) -> Any:
        final = alone(batch.input_ids_BT).final_BTD.flatten(0, 1)
        return chunked_head_loss(
            final, alone.head_weight, batch.labels_BT.flatten(), None, [WeightedTerm(1.0, CrossEntropy())]
        )

    batches = endless_batches(source, 8, Signals(), config.seed)
    Training("alone", alone, loss, batches, 96, config, tmp_path / "alone").run()
    together = load_model(tmp_path / "student" / "co_teacher")
    for a, b in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_average_follows_the_weights_and_that_of_ternary_ones_is_warned_of(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = trace(run, tmp_path, tmp_path / "a", targets="online", online={"co_train": True, "ema": 0.5}, alpha=0.3)
    assert set(log[-1]["terms"]) == {"cross_entropy", "forward_kl", "teacher_cross_entropy"}
    assert "latent weights" not in capsys.readouterr().err
    trace(run, tmp_path, tmp_path / "b", targets="online", online={"ema": 0.9, "ema_of": "student"}, alpha=0.3)
    assert "warning: distill.online.ema averages the latent weights of a ternary model" in capsys.readouterr().err
    plain = StudentConfig(quantize=QuantizeConfig(weights="none", activations="none"))
    one_step = {"steps": 1, "learning_rate": 1e-2, "batch_windows": 8}
    online = {"ema": 0.75, "ema_of": "student"}
    trace(run, tmp_path, tmp_path / "c", plain, targets="online", online=online, training=one_step)
    first = Transformer(SHAPE, load_model(run / "teacher").vocab_size, plain.quantize)
    first.initialize(torch.Generator().manual_seed(0))
    student, average = load_model(tmp_path / "c"), load_model(tmp_path / "c" / "co_teacher")
    for start, end, mean in zip(first.parameters(), student.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.5 * start + 0.5 * end)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": {"kind": "adaptive", "start": 4, "factor": 0.7, "bound_nats": 9, "patience": 2}},
        {
            "balance": {"every": 3},
            "hidden": {"layers": {1: 2}, "projection": "always", "projection_learning_rate": 0.1},
        },
        {"online": {"co_train": True, "ema": 0.9}},
        {"online": {"ema": 0.9, "ema_of": "student"}},
    ],
    ids=["adaptive", "balance", "co_train", "ema"],
)
def test_a_resumed_training_has_the_state_of_an_uninterrupted_one(
    run: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Checkpoints are at steps 5 and 10; the interruption is after step 7."""
    whole = trace(run, tmp_path, tmp_path / "whole", targets="online", **changes)
    teacher = None if "online" in changes else load_model(run / "teacher")
    source = UnpluggedSource(run / "data", CPU, teacher=teacher, max_train_windows=700)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        student_from(source, run, tmp_path / "cut", distill_config(targets="online", **changes))
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000005"]
    resumed = trace(run, tmp_path, tmp_path / "cut", targets="online", **changes)
    assert without_speeds(resumed) == without_speeds(whole)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_telemetry_says_what_each_term_weighs_from_the_first_step_on(run: Path, whole: Path, tmp_path: Path) -> None:
    relations = {"layers": {2: 2}, "heads": 2, "weight": 0.3}
    log = trace(run, whole, tmp_path / "s", targets="cached", alpha=0.25, temperature=2.0, relations=relations)
    assert log[0]["step"] == 1
    for record in log:
        names = {"cross_entropy", "forward_kl", "relations"}
        for key in ("terms", "weights", "weighted", "gradient_share"):
            assert set(record[key]) == names, key
        assert record["weights"] == {"cross_entropy": 0.25, "forward_kl": 3.0, "relations": 0.3}
        assert sum(record["weighted"].values()) == pytest.approx(record["loss"], rel=1e-5)
        assert sum(record["gradient_share"].values()) == pytest.approx(1)
        assert record["temperatures"] == {"forward_kl": 2.0}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_balance_brings_gradients_to_the_ratio_of_the_weights_at_any_temperature(
    run: Path, whole: Path, tmp_path: Path, accumulation: int
) -> None:
    training = {"steps": 4, "learning_rate": 1e-5, "batch_windows": 8, "log_every": 1, "accumulation": accumulation}
    changes = {"alpha": 0.25, "temperature": 5.0, "balance": {"every": 1, "smoothing": 0.0}}
    log = trace(run, whole, tmp_path / "s", targets="cached", training=training, **changes)
    share = log[-1]["gradient_share"]
    assert share["forward_kl"] / share["cross_entropy"] == pytest.approx(3.0, rel=0.15)
    first = log[0]["gradient_share"]
    assert first["forward_kl"] / first["cross_entropy"] != pytest.approx(3.0, rel=0.3)


def test_a_weight_may_fall_to_zero(run: Path, whole: Path, tmp_path: Path) -> None:
    losses = [{"kind": "forward_kl", "weight": {"kind": "linear", "start": 1.0, "end": 0.0}}]
    relations = {"layers": "all", "heads": 2}
    log = trace(run, whole, tmp_path / "s", targets="cached", losses=losses, relations=relations)
    assert set(log[0]["terms"]) == {"forward_kl", "relations"}
    assert set(log[-1]["terms"]) == {"relations"}
