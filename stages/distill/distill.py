"""Stage two: trains a student on targets from a source, evaluates it, and saves it."""

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from cache.atomic import write_atomically
from stages.distill.config import DistillConfig, StudentConfig
from stages.distill.curriculum import pacing_of
from stages.distill.moving_teacher import CoTraining
from stages.distill.objective import Objective
from stages.distill.watch import Watch
from stages.errors import CheckpointError
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluate import evaluate, glance
from stages.evaluate.metrics import ValidationMetrics
from stages.models.compiled import compile_model
from stages.models.config import ModelConfig
from stages.models.description import read_description
from stages.models.folder import WEIGHTS_NAME, load_weights, model_fingerprint, read_tensors, save_model
from stages.models.subln import fit_to_inputs
from stages.models.transformer import Transformer
from stages.targets.source import Epoch, Signals, TargetSource, endless_batches
from stages.training.loop import Training, TrainingSummary

CO_TEACHER = "co_teacher"


class ModelSize(BaseModel):
    """Parameters, and bytes when quantised weights take their bits (ternary ones 2), scales and all other weights 16.

    A learned step is a scale, and is not counted among the parameters. `ternary_parameters` are those of BitNet b1.58
    only, zero for every other code.
    """

    model_config = ConfigDict(frozen=True)

    parameters: int
    ternary_parameters: int
    packed_bytes: int


class StudentSummary(BaseModel):
    """`summary.json` of a student."""

    model_config = ConfigDict(frozen=True)

    validation: ValidationMetrics
    train: TrainingSummary
    targets: str
    model: ModelSize
    fingerprints: dict[str, str]


def distill(
    config: DistillConfig,
    student_config: StudentConfig,
    shape: ModelConfig,
    source: TargetSource,
    device: torch.device,
    folder: Path,
    teacher_folder: Path,
    evaluation: EvaluateConfig,
    inputs: dict[str, str],
    teacher_shape: ModelConfig | None = None,
    watch: Watch | None = None,
) -> StudentSummary:
    """Train, save, evaluate; resumes from the last checkpoint in `folder`.

    `teacher_folder` is opened only for `init = "teacher"`. `inputs` are fingerprints to repeat in the summary.
    `teacher_shape`: of a teacher that is trained beside the student; None for the student's. It is saved in a folder
    of the student's, as it gave the targets at the end. `watch`: what looks at the student while it trains.
    """
    torch.manual_seed(config.training.seed)
    student = Transformer(shape, source.vocab_size, student_config.quantize)
    student.initialize(torch.Generator().manual_seed(config.training.seed))
    student.to(device)
    if student_config.init == "teacher":
        start_from_teacher(student, teacher_folder, source)
    elif shape.subln:
        _fit_subln(student, source)
    if config.training.compile:
        compile_model(student)
    learner: Objective | CoTraining
    if config.online is None:
        learner = Objective(student, config, source).to(device)
    else:
        learner = CoTraining.of(student, config, source, teacher_shape or shape, device)
        source = learner.source
    pacing = pacing_of(config.curriculum, config.training, source) if config.curriculum else None
    training = Training(
        folder.name,
        learner,
        learner.forward,
        endless_batches(source, config.training.batch_windows, learner.signals, config.training.seed, pacing),
        config.training.batch_windows * source.context_length,
        config.training,
        folder,
        learning_rates=learner.learning_rates,
        after_step=learner.after_step,
        clipped_apart=learner.clipped_apart,
        watch=_looks(watch, learner, student, source, evaluation, config.training.steps),
    )
    trained = training.run()
    if isinstance(learner, CoTraining):
        end_of_text_id, teacher = source.end_of_text_id, learner.moving.teacher
        save_model(folder / CO_TEACHER, teacher, source.tokenizer_path, source.context_length, end_of_text_id)
    save_model(folder, student, source.tokenizer_path, source.context_length, source.end_of_text_id)
    summary = StudentSummary(
        validation=evaluate(student, source, evaluation, folder.name),
        train=trained,
        targets=source.kind,
        model=model_size(shape, student_config, source.vocab_size),
        fingerprints={**inputs, "student": model_fingerprint(folder)},
    )
    write_atomically(folder / "summary.json", (summary.model_dump_json(indent=2) + "\n").encode())
    training.clear_checkpoints()
    return summary


def _looks(
    watch: Watch | None,
    learner: Objective | CoTraining,
    student: Transformer,
    source: TargetSource,
    evaluation: EvaluateConfig,
    num_steps: int,
) -> Callable[[int], None]:
    """What the training calls after each step; the last one is followed by the whole evaluation."""

    def look(steps_done: int) -> None:
        if watch is not None and steps_done % watch.every == 0 and steps_done < num_steps:
            metrics = glance(student, source, evaluation, watch.num_windows)
            learner.train()
            watch.report(steps_done, metrics.model_dump())

    return look


def model_size(shape: ModelConfig, student: StudentConfig, vocab_size: int) -> ModelSize:
    """Parameters and packed bytes of a student."""
    quantize = student.quantize
    parameters = shape.parameters(vocab_size)
    shapes = [found for name, found in shape.all_linear_shapes(vocab_size).items() if quantize.covers(name)]
    coded = sum(rows * columns for rows, columns in shapes) if quantize.packed_bits else 0
    scales = sum(quantize.num_scales(rows, columns) for rows, columns in shapes)
    shared = 2 * vocab_size * shape.width if shape.tied_embeddings and quantize.covers("lm_head") and coded else 0
    return ModelSize(
        parameters=parameters,
        ternary_parameters=coded if quantize.is_ternary else 0,
        packed_bytes=-(-coded * (quantize.packed_bits or 0) // 8) + 2 * (parameters - coded + scales) + shared,
    )


def start_from_teacher(student: Transformer, teacher_folder: Path, source: TargetSource) -> None:
    """Give a student its teacher's weights; learned steps where they mean the same, and SubLN where there is none."""
    path = teacher_folder / WEIGHTS_NAME
    own = (".log_step", "_sub_norm.weight")
    extra = {name: tensor for name, tensor in student.state_dict().items() if name.endswith(own)}
    theirs = read_description(teacher_folder).quantize
    has_its_steps = theirs is not None and student.quantize is not None and theirs.has_steps_of(student.quantize)
    tensors = read_tensors(path)
    if not has_its_steps:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".log_step")}
    try:
        load_weights(student, {**extra, **tensors}, path)
    except CheckpointError as exc:
        raise CheckpointError(
            f"{exc}; student.init = 'teacher' needs the teacher's folder and a student of its shape: leave "
            "student.model out, or set student.init to 'random'"
        ) from exc
    if not has_its_steps:
        student.fit_steps()  # they follow from the weights
    if student.config.subln and not any(name.endswith("_sub_norm.weight") for name in tensors):
        _fit_subln(student, source)


def _fit_subln(student: Transformer, source: TargetSource) -> None:
    """Let SubLN begin where it changes least: in full precision, on one window."""
    batch = next(source.batches("train", 1, Signals(), Epoch()))
    student.quantize_by(0)
    fit_to_inputs(student, lambda: student(batch.input_ids_BT))
    student.quantize_by(1)
