"""Teachers that move: how often they are forwarded, and in which precision."""

from pathlib import Path

import pytest
import torch
from small_training import CPU, SHAPE, distill_config, make_run

from tristill.stages.distill.moving_teacher import CoTraining
from tristill.stages.errors import CheckpointError
from tristill.stages.models.transformer import Transformer
from tristill.stages.targets.online import OnlineSource
from tristill.stages.targets.source import Epoch, Signals, TargetBatch
from tristill.stages.training.loop import StepInfo


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def batch(run: Path) -> TargetBatch:
    return next(OnlineSource(run / "data", CPU).batches("train", 8, Signals(), Epoch(1)))


def co_training(run: Path, **online: object) -> CoTraining:
    source = OnlineSource(run / "data", CPU)
    student = Transformer(SHAPE, source.vocab_size)
    student.initialize(torch.Generator().manual_seed(5))
    hidden = {"layers": {1: 2}, "projection": "if-needed"}
    config = distill_config(targets="online", online={"co_train": True, **online}, alpha=0.3, hidden=hidden)
    return CoTraining.of(student, config, source, SHAPE, CPU)


def num_forwards(learner: CoTraining, batch: TargetBatch, *, bfloat16: bool = False) -> dict[str, int]:
    """How often each moving model was forwarded for a batch."""
    calls = {"trained": 0, "average": 0}

    def count(name: str) -> None:
        calls[name] += 1

    for name in calls:
        if (model := getattr(learner.moving, name)) is not None:
            model.register_forward_pre_hook(lambda module, inputs, name=name: count(name))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        learner.forward(batch, StepInfo(0))
    return calls


def test_one_forward_pass_gives_the_targets_and_the_loss_of_a_co_trained_teacher(run: Path, batch: TargetBatch) -> None:
    assert num_forwards(co_training(run), batch) == {"trained": 1, "average": 0}
    assert num_forwards(co_training(run), batch, bfloat16=True) == {"trained": 2, "average": 0}
    assert num_forwards(co_training(run, ema=0.9), batch) == {"trained": 1, "average": 1}


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("online", [{}, {"ema": 0.9}], ids=["trained", "average"])
def test_targets_of_a_moving_teacher_are_those_of_the_same_teacher_frozen_whatever_the_students_precision(
    run: Path, batch: TargetBatch, bfloat16: bool, online: dict[str, object]
) -> None:
    learner = co_training(run, **online)
    teacher = learner.moving.teacher
    frozen = OnlineSource(run / "data", CPU, teacher=teacher).with_teacher(batch, learner.objective.signals)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        found = learner.forward(batch, StepInfo(0))
        expected = learner.objective.forward(frozen, StepInfo(0))
    assert set(found.terms) == {*expected.terms, "teacher_cross_entropy"}
    for name, value in expected.terms.items():
        assert torch.equal(found.terms[name], value), name


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_co_trained_teacher_that_overflows_is_refused_by_name(run: Path, batch: TargetBatch, bfloat16: bool) -> None:
    learner = co_training(run)
    assert learner.moving.trained is not None
    with torch.no_grad():
        learner.moving.trained.get_parameter("model.layers.1.mlp.down_proj.weight").fill_(torch.inf)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
        pytest.raises(CheckpointError, match=r"the teacher trained beside the student: .*layer 2.* not finite"),
    ):
        learner.forward(batch, StepInfo(0))


def test_no_gradient_of_the_student_reaches_the_teacher_and_none_of_the_teacher_the_student(
    run: Path, batch: TargetBatch
) -> None:
    learner = co_training(run)
    trained = learner.moving.trained
    assert trained is not None
    learner.forward(batch, StepInfo(0)).total.backward()  # type: ignore[no-untyped-call]
    together = [parameter.grad for parameter in trained.parameters()]
    trained.zero_grad()
    learner.zero_grad()
    taught = OnlineSource(run / "data", CPU, teacher=trained).with_teacher(batch, learner.objective.signals)
    learner.objective.forward(taught, StepInfo(0)).total.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in trained.parameters())
    logits = trained.logits(batch.input_ids_BT)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten()).backward()
    for parameter, gradient in zip(trained.parameters(), together, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)
