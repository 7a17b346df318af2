"""The one training loop: schedules, resuming, accumulation, refusals."""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toy_training import batches_from, config, logged, make_module, state, training

from tristill.stages.errors import CheckpointError, CorpusError, StageError
from tristill.stages.evaluate.metrics import ValidationMetrics
from tristill.stages.losses.term import LossValues
from tristill.stages.targets.source import Epoch, Signals, endless_batches
from tristill.stages.training.checkpoint import clear_checkpoints
from tristill.stages.training.loop import StepInfo, Training
from tristill.stages.training.means import RunningMeans
from tristill.stages.training.optimizer import make_optimizer
from tristill.stages.training.schedule import learning_rate
from tristill.stages.training.watch import PartingNote


@pytest.mark.parametrize("stop_at", [3, 5, 12, 18])
@pytest.mark.parametrize("schedule", ["cosine", "trapezoid"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, stop_at: int, schedule: str) -> None:
    settings = config(schedule=schedule, checkpoint_every=5)
    whole = make_module()
    expected = training(tmp_path / "whole", whole, settings)
    (tmp_path / "whole").mkdir()
    expected.run()

    (tmp_path / "cut").mkdir()
    with pytest.raises(RuntimeError, match="pulled the plug"):
        training(tmp_path / "cut", make_module(), settings, stop_at=stop_at).run()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as log:
        log.write('\0\0\0\n{"step": 1')  # a loss of power, then a kill in the middle of a line
    resumed = make_module()
    training(tmp_path / "cut", resumed, settings).run()
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(resumed), strict=True))
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    clear_checkpoints(tmp_path / "cut" / "checkpoints")
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_what_is_logged_are_means_over_the_steps_since_the_last_record(tmp_path: Path) -> None:
    for name, every in (("each", 1), ("means", 6)):
        (tmp_path / name).mkdir()
        training(tmp_path / name, make_module(), config(log_every=every)).run()
    each, means = logged(tmp_path / "each"), logged(tmp_path / "means")
    assert [record["step"] for record in means] == [1, 6, 12, 18, 20]
    for record, first, last in zip(means, [0, 1, 6, 12, 18], [1, 6, 12, 18, 20], strict=True):
        for key in ("loss", "grad_norm"):
            assert record[key] == pytest.approx(np.mean([one[key] for one in each[first:last]]), rel=1e-12)
        assert record["terms"]["square"] == record["loss"]  # type: ignore[index]
        assert record["learning_rate"] == each[last - 1]["learning_rate"], "that of the last step"


def test_steps_that_ask_for_no_position_are_left_out_of_the_means() -> None:
    means = RunningMeans({})
    for loss, norm in ((2.0, 1.0), (0.0, 0.0), (4.0, 2.0)):
        means.add(LossValues(torch.tensor(loss), {"a": torch.tensor(loss)}), torch.tensor(norm))
    means = RunningMeans(json.loads(json.dumps(means.sums())))
    assert means.take() == (3.0, {"a": 3.0}, 1.5)
    means.add(LossValues(torch.tensor(0.0), {"a": torch.tensor(0.0)}), torch.tensor(0.0))
    assert means.take() == (0.0, {"a": 0.0}, 0.0), "nothing is left of the interval before"


def metrics(loss_nats: float) -> ValidationMetrics:
    nothing = dict.fromkeys(("kl_to_teacher_nats", "top1_agreement", "acceptance_rate", "teacher_temperature"))
    means = {"loss_nats": loss_nats, "perplexity": math.exp(loss_nats), "bits_per_byte": 1.0}
    return ValidationMetrics(positions=4, expected_calibration_error=0.0, **means, **nothing)  # type: ignore[arg-type]


def test_held_out_losses_are_recorded_and_change_nothing_of_the_training(tmp_path: Path) -> None:
    def train(name: str, stop_at: int | None = None, **changes: object) -> nn.Module:
        module = nn.Sequential(make_module(), nn.Dropout(0.3))

        def measure(num_windows: int) -> ValidationMetrics:
            module.eval()
            torch.randn(num_windows)  # a look that draws
            return metrics(float(module(next(batches_from(999))).detach().abs().mean()))

        (tmp_path / name).mkdir(exist_ok=True)
        torch.manual_seed(5)
        training(tmp_path / name, module, config(**changes), stop_at=stop_at, measure=measure).run()
        return module

    looks = {"eval_every": 4, "eval_windows": 7, "checkpoint_every": 5}
    alone, looked = train("alone"), train("looked", **looks)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train("cut", stop_at=13, **looks)
    resumed = train("cut", **looks)
    assert all(torch.equal(a, b) for a, b in zip(state(alone), state(looked), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state(alone), state(resumed), strict=True))
    found = {record["step"]: record["held_out"] for record in logged(tmp_path / "looked") if "held_out" in record}
    assert list(found) == [4, 8, 12, 16, 20]
    expected = looked.eval()(next(batches_from(999))).detach().abs().mean()
    assert found[20]["loss_nats"] == pytest.approx(float(expected))  # type: ignore[index]
    assert logged(tmp_path / "cut") == logged(tmp_path / "looked")
    plain = [
        {key: value for key, value in record.items() if key != "held_out"} for record in logged(tmp_path / "looked")
    ]
    assert [record for record in plain if "loss" in record] == logged(tmp_path / "alone")
    assert config(**looks).numbers() == config().numbers()


def records(held_out: list[float], train: list[float]) -> list[dict[str, Any]]:
    pairs = enumerate(zip(held_out, train, strict=True), start=1)
    return [{"step": 10 * n, "loss": loss, "held_out": {"loss_nats": seen}} for n, (seen, loss) in pairs]


@pytest.mark.parametrize(
    ("held_out", "train", "step"),
    [
        ([4.0, 3.5, 3.6, 3.7, 3.9], [4.0, 3.4, 3.2, 3.0, 2.8], 20),
        ([4.0, 3.5, 3.6, 3.4, 3.3], [4.0, 3.4, 3.2, 3.0, 2.8], None),
        ([4.0, 3.5, 3.505, 3.51, 3.512], [4.0, 3.4, 3.2, 3.0, 2.8], None),
        ([4.0, 3.5, 3.7, 3.9, 4.1], [4.0, 3.4, 3.6, 3.8, 4.0], None),
    ],
    ids=["overfits", "one bad look", "flat", "diverges"],
)
def test_train_and_held_out_part_where_one_rises_while_the_other_falls(
    held_out: list[float], train: list[float], step: int | None
) -> None:
    known = records(held_out, train)
    note = PartingNote([])
    found = [parting for record in known if (parting := note.add(record))]
    assert [parting.step for parting in found] == ([] if step is None else [step])
    resumed = PartingNote(known[:4])
    assert [resumed.add(record) for record in known[4:]] == [None], "told before, or nothing to tell"
    if found:
        assert "3.5000 nats at step 20, 3.7000 at step 40 (overfitting)" in found[0].text


def test_ctrl_c_saves_a_checkpoint_first(tmp_path: Path) -> None:
    settings = config(steps=100_000, checkpoint_every=100_000)
    module = make_module()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path, module, settings, batches=lambda n: (b for _ in range(99) for b in batches_from(n))).run()
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert json.loads((saved / "state.json").read_text())["step"] == int(saved.name.removeprefix("step-"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_checkpoint_that_was_not_finished_is_not_taken_for_one(tmp_path: Path) -> None:
    settings = config(checkpoint_every=5)
    with pytest.raises(RuntimeError, match="pulled"):
        training(tmp_path, make_module(), settings, stop_at=7).run()
    (tmp_path / "checkpoints" / ".step-00000010.partial").mkdir()
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    (tmp_path / "checkpoints" / "step-00000099").mkdir()
    resumed = make_module()
    training(tmp_path, resumed, settings).run()
    clear_checkpoints(tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "whole").mkdir()
    whole = make_module()
    training(tmp_path / "whole", whole, settings).run()
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(resumed), strict=True))


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="pulled"):
        training(tmp_path, make_module(), config(checkpoint_every=5), stop_at=7).run()
    (tmp_path / "checkpoints" / "step-00000005" / "optimizer.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"step-00000005: cannot be resumed from .* delete it"):
        training(tmp_path, make_module(), config(checkpoint_every=5)).run()


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    def large(first: int) -> Iterator[torch.Tensor]:
        small = batches_from(first * 3)
        while True:
            yield torch.cat([next(small) for _ in range(3)])

    parts, whole = make_module(), make_module()
    for name in ("parts", "whole"):
        (tmp_path / name).mkdir()
    training(tmp_path / "parts", parts, config(accumulation=3)).run()
    training(tmp_path / "whole", whole, config(), batches=large).run()
    for a, b in zip(state(parts), state(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    def poisoned(first: int) -> Iterator[torch.Tensor]:
        for number, batch in enumerate(batches_from(first), start=first):
            yield batch * (math.nan if number >= 4 else 1)

    with pytest.raises(StageError, match=r"test: the loss is nan .* at step 6; lower learning_rate"):
        training(tmp_path, make_module(), config(), batches=poisoned).run()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "trapezoid"])
def test_schedules_rise_stay_and_fall_as_their_formula_says(schedule: str) -> None:
    settings = config(steps=100, warmup_steps=10, schedule=schedule, decay_fraction=0.3, final_lr_fraction=0.1)
    rates = [learning_rate(settings, step) / settings.learning_rate for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    if schedule == "cosine":
        expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 89)) for step in range(10, 100)]
    elif schedule == "linear":
        expected = [0.1 + 0.9 * (99 - step) / 89 for step in range(10, 100)]
    else:
        expected = [0.1 + 0.9 * min(1.0, (99 - step) / 30) for step in range(10, 100)]
    assert rates[10:] == pytest.approx(expected)


class NumberedSource:
    """A source whose batches say which they are."""

    def num_windows(self, split: str) -> int:
        return 10

    def batches(self, split: str, size: int, signals: Signals, epoch: Epoch) -> Iterator[tuple[int, int]]:
        return ((epoch.number, batch) for batch in range(epoch.first_batch, 10 // size))


def test_batches_go_on_through_epochs_from_any_point() -> None:
    make = endless_batches(NumberedSource(), 3, Signals(), seed=0)  # type: ignore[arg-type]
    stream = make(0)
    whole = [next(stream) for _ in range(20)]
    assert whole[:4] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    for first in range(10):
        rest = make(first)
        assert [next(rest) for _ in range(10)] == whole[first : first + 10]


def test_a_split_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(CorpusError, match="the train split has 10 windows, fewer than one batch of 11"):
        endless_batches(NumberedSource(), 11, Signals(), seed=0)  # type: ignore[arg-type]


def test_gradients_are_clipped_to_the_norm_before_the_step(tmp_path: Path) -> None:
    """Against a loop written out here; AdamW hides a constant factor, so several steps of varying norm are compared."""
    weights = {}
    for limit in (None, 0.5):
        settings = config(steps=6, warmup_steps=0, grad_clip=limit)
        module, reference = make_module(), make_module()
        training(tmp_path / str(limit), module, settings).run()
        optimizer = make_optimizer(reference, settings)
        for step, batch in zip(range(6), batches_from(0), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            optimizer.zero_grad()
            (reference(batch) - batch.sum(-1, keepdim=True)).square().mean().backward()
            norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
            for parameter in reference.parameters():
                parameter.grad *= 1 if limit is None else min(1.0, limit / float(norm))
            optimizer.step()
        weights[limit] = state(module)
        for found, expected in zip(state(module), state(reference), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(weights[None], weights[0.5], strict=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_autocast_covers_the_loss_and_not_the_source_of_targets(tmp_path: Path, precision: str) -> None:
    seen: dict[str, set[bool]] = {"loss": set(), "batches": set()}
    module = make_module()

    def batches(first: int) -> Iterator[torch.Tensor]:
        for batch in batches_from(first):
            seen["batches"].add(torch.is_autocast_enabled("cpu"))
            yield batch

    def loss(batch: torch.Tensor, info: StepInfo) -> LossValues:
        seen["loss"].add(torch.is_autocast_enabled("cpu"))
        value = module(batch).float().square().mean()
        return LossValues(value, {"square": value.detach()})

    Training("test", module, loss, batches, 4, config(precision=precision), tmp_path).run()
    assert seen == {"loss": {precision == "bfloat16"}, "batches": {False}}


def test_weight_decay_spares_vectors() -> None:
    optimizer = make_optimizer(make_module(), config(weight_decay=0.3))
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(7, 5): 0.3, (1, 7): 0.3, (7,): 0.0, (1,): 0.0}


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    def poisoned(first: int) -> Iterator[torch.Tensor]:
        for number, batch in enumerate(batches_from(first), start=first):
            yield batch * (math.nan if number >= 5 else 1)

    with pytest.raises(StageError, match="at step 7"):
        training(tmp_path, make_module(), config(log_every=100, checkpoint_every=7), batches=poisoned).run()
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_time_spent_before_a_resume_counts(tmp_path: Path) -> None:
    slow = config(checkpoint_every=5)

    def waiting(first: int) -> Iterator[torch.Tensor]:
        for batch in batches_from(first):
            time.sleep(0.02)
            yield batch

    with pytest.raises(RuntimeError, match="pulled"):
        training(tmp_path, make_module(), slow, batches=waiting, stop_at=16).run()
    assert training(tmp_path, make_module(), slow).run().elapsed_s > 15 * 0.02


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) of every tag."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def recorded(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.jsonl, in TensorBoard's float32."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        tables = [name for name, value in record.items() if isinstance(value, dict)]
        record |= {f"{name}/{key}": value for name in tables for key, value in record.pop(name).items()}
        for tag, value in record.items():
            found.setdefault(tag, []).append((step, float(np.float32(value))))
    return found


@pytest.mark.parametrize("stop_at", [None, 3, 12, 18])
def test_tensorboard_shows_what_metrics_jsonl_holds_also_after_a_resume(tmp_path: Path, stop_at: int | None) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    settings = config(checkpoint_every=5, tensorboard=True)
    if stop_at is not None:
        with pytest.raises(RuntimeError, match="pulled the plug"):
            training(tmp_path, make_module(), settings, stop_at=stop_at).run()
        assert scalars(tmp_path / "tensorboard") == recorded(tmp_path)
    training(tmp_path, make_module(), settings).run()
    found = scalars(tmp_path / "tensorboard")
    assert found == recorded(tmp_path)
    assert [step for step, _ in found["loss"]] == [1, 3, 6, 9, 12, 15, 18, 20]
    assert {"positions", "terms/square", "weights/square", "learning_rate", "grad_norm"} < found.keys()


def test_tensorboard_changes_no_number_and_leaves_no_folder_while_it_is_off(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    modules = {is_on: make_module() for is_on in (True, False)}
    for is_on, module in modules.items():
        training(tmp_path / str(is_on), module, config(tensorboard=is_on)).run()
    assert all(torch.equal(a, b) for a, b in zip(state(modules[True]), state(modules[False]), strict=True))
    assert config(tensorboard=True).numbers() == config().numbers()
    assert [path.name for path in (tmp_path / "False").iterdir()] == ["metrics.jsonl"]


def test_tensorboard_without_its_package_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(StageError, match=r"tensorboard is on .* pip install 'tristill\[tensorboard\]', or set"):
        training(tmp_path, make_module(), config(tensorboard=True), stop_at=0).run()
    assert not (tmp_path / "metrics.jsonl").exists()
