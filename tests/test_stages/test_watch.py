"""A student that is looked at while it trains is the same student, and whoever looks may end its training."""

import json
from pathlib import Path

import pytest
from small_training import CPU, SHAPE, distill_config, dump_config, make_run, places

from tristill.stages.distill.choose import choose_source
from tristill.stages.distill.config import DistillConfig, StudentConfig
from tristill.stages.distill.distill import StudentSummary, distill
from tristill.stages.dump.dump import dump_logits
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.models.description import ModelConfig
from tristill.stages.quantize.config import QuantizeConfig, WarmupConfig
from tristill.stages.training.watch import Watch

EVALUATE = EvaluateConfig(batch_windows=2)


class GivenUpError(Exception):
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"))
    dump_logits(dump_config(), folder / "data", folder / "teacher", folder / "cache")
    return folder


def student(
    run: Path, folder: Path, watch: Watch | None = None, config: DistillConfig | None = None, shape: ModelConfig = SHAPE
) -> StudentSummary:
    config = config or distill_config(alpha=0.5)
    source = choose_source(config, dump_config(), shape.layers, places(run, run / "cache"), CPU)
    quantize = QuantizeConfig(warmup=WarmupConfig(steps=6))
    how = StudentConfig(quantize=quantize)
    return distill(config, how, shape, source, CPU, folder, run / "teacher", EVALUATE, {}, watch=watch)


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 0.5},
        {"hidden": {"layers": {2: 2}, "weight": 0.5}, "balance": {"every": 3}},
        {"mining": {"fraction": 0.5}},
    ],
    ids=["plain", "balance of hidden states", "mining"],
)
def test_a_watched_training_ends_with_the_same_weights_bit_for_bit(
    run: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    config = distill_config(**changes)
    seen: dict[int, dict[str, float | None]] = {}
    watch = Watch(every=4, num_windows=3, report=seen.__setitem__)
    alone = student(run, tmp_path / "alone", config=config)
    recording = config.training.model_copy(update={"eval_every": 4, "eval_windows": 3})
    watched = student(run, tmp_path / "watched", watch, config=config.model_copy(update={"training": recording}))
    assert sorted(seen) == [4, 8], "12 steps, and the last is followed by the whole evaluation"
    assert {values["positions"] for values in seen.values()} == {4 * 12}, "two batches of two windows"
    records = map(json.loads, (tmp_path / "watched" / "metrics.jsonl").read_text().splitlines())
    held_out = {record["step"]: record["held_out"] for record in records if "held_out" in record}
    assert list(held_out) == [4, 8, 12]
    assert {step: held_out[step]["kl_to_teacher_nats"] for step in seen} == {
        step: values["kl_to_teacher_nats"] for step, values in seen.items()
    }
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "watched")]
    assert weights[0] == weights[1]
    assert alone.validation == watched.validation
    assert alone.train.loss_terms == watched.train.loss_terms


def test_a_look_sees_what_the_training_is_at_that_step(run: Path, tmp_path: Path) -> None:
    """A schedule without an end is the same for a shorter training, which is evaluated on the same windows."""
    settings = {"schedule": "linear", "final_lr_fraction": 1.0}
    longer = distill_config(alpha=0.5)
    longer = longer.model_copy(update={"training": longer.training.model_copy(update=settings)})
    shorter = longer.model_copy(update={"training": longer.training.model_copy(update={"steps": 8})})
    windows = choose_source(longer, dump_config(), 2, places(run, run / "cache"), CPU).num_windows("validation")
    seen: dict[int, dict[str, float | None]] = {}
    student(run, tmp_path / "longer", Watch(8, windows, seen.__setitem__), longer)
    whole = student(run, tmp_path / "shorter", config=shorter)
    assert seen[8] == whole.validation.model_dump() | {"standard_errors": None}


def test_a_training_that_a_watch_ends_is_unfinished_and_goes_on_as_if_it_had_not(run: Path, tmp_path: Path) -> None:
    def give_up(step: int, metrics: dict[str, float | None]) -> None:
        if step == 9:
            raise GivenUpError

    with pytest.raises(GivenUpError):
        student(run, tmp_path / "ended", Watch(3, 2, give_up))
    assert not (tmp_path / "ended" / "summary.json").exists()
    assert not (tmp_path / "ended" / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "ended" / "checkpoints").iterdir()] == ["step-00000005"]
    ended = student(run, tmp_path / "ended")
    alone = student(run, tmp_path / "alone")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "ended")]
    assert weights[0] == weights[1]
    assert alone.validation == ended.validation
