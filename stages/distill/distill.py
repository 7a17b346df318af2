"""Stage two: trains a student on targets from a source, evaluates it, and saves it."""

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from tristill.cache.atomic import write_atomically
from tristill.stages.distill.config import DistillConfig, StudentConfig
from tristill.stages.distill.coverage import coverage
from tristill.stages.distill.curriculum import pacing_of
from tristill.stages.distill.moving_teacher import CoTraining
from tristill.stages.distill.objective import Objective
from tristill.stages.distill.start import start
from tristill.stages.errors import StageError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.evaluate.evaluate import basis, evaluate, evaluate_test, glance
from tristill.stages.evaluate.metrics import ValidationMetrics
from tristill.stages.export.refusal import early_refusals
from tristill.stages.models.checkpoint import new_model, save_model
from tristill.stages.models.description import HuggingFaceShape, Shape
from tristill.stages.models.language_model import LanguageModel
from tristill.stages.models.origin import model_fingerprint
from tristill.stages.models.transformer import compile_model
from tristill.stages.progress import say
from tristill.stages.ranks import current_ranks
from tristill.stages.targets.source import TargetSource, endless_batches
from tristill.stages.training.loop import Training, TrainingSummary
from tristill.stages.training.start_line import parameters_text, say_length, say_start
from tristill.stages.training.watch import Watch

CO_TEACHER = "co_teacher"


class ModelSize(BaseModel):
    """Parameters, and bytes when quantised weights take their bits (ternary ones 2), scales and all other weights 16.

    A learned step is a scale, and is not counted among the parameters. `ternary_parameters` are those of BitNet b1.58
    only, zero for every other code. `quantized_share`: of the weights of the blocks, see Coverage; None in summaries
    of students made before it was measured.
    """

    model_config = ConfigDict(frozen=True)

    parameters: int
    ternary_parameters: int
    packed_bytes: int
    quantized_share: float | None = None


class StudentSummary(BaseModel):
    """`summary.json` of a student. basis: what its validation follows from; see stages.evaluate.evaluate."""

    model_config = ConfigDict(frozen=True)

    validation: ValidationMetrics
    test: ValidationMetrics | None = None
    train: TrainingSummary
    targets: str
    model: ModelSize
    fingerprints: dict[str, str]
    basis: str | None = None


def distill(
    config: DistillConfig,
    student_config: StudentConfig,
    shape: Shape,
    source: TargetSource,
    device: torch.device,
    folder: Path,
    teacher_folder: Path,
    evaluation: EvaluateConfig,
    inputs: dict[str, str],
    teacher_shape: Shape | None = None,
    watch: Watch | None = None,
) -> StudentSummary:
    """Train, save, evaluate; resumes from the last checkpoint in `folder`. All ranks must call it.

    `teacher_folder` is opened only for `init = "teacher"`. `inputs` are fingerprints to repeat in the summary.
    `teacher_shape`: of a teacher that is trained beside the student; None for the student's. It is saved in a folder
    of the student's, as it gave the targets at the end. `watch`: what looks at the student while it trains.
    """
    ranks = current_ranks()
    if watch is not None and ranks.are_many:
        raise StageError(
            f"found {ranks.world_size} ranks for a student that is looked at while it trains, expected one process; "
            "run the sweep without torchrun"
        )
    torch.manual_seed(config.training.seed)
    if isinstance(shape, HuggingFaceShape) and student_config.init == "random":
        shape = shape.of_vocabulary(source.vocab_size)  # others keep the padding that their weights have
    student = new_model(shape, source.vocab_size, student_config.quantize, config.training.seed).to(device)
    start(student, student_config, teacher_folder, source)
    size = model_size(student)  # while its tensors are whole
    for line in coverage(student).lines(folder.name) if student_config.quantize.packed_bits else []:
        say(line)
    if student_config.quantize.packed_bits and (refused := early_refusals(student, source.tokenizer_path)):
        say(f"warning: {folder.name}: {refused}")
    if config.training.compile:
        compile_model(student)
    learner: Objective | CoTraining
    if config.online is None:
        learner = Objective(student, config, source, ranks).to(device)
    else:
        learner = CoTraining.of(student, config, source, teacher_shape or shape, device, ranks)
        source = learner.source
    pacing = pacing_of(config.curriculum, config.training, source) if config.curriculum else None
    training = Training(
        folder.name,
        learner,
        learner.forward,
        endless_batches(source, config.training.batch_windows, learner.signals, config.training.seed, pacing, ranks),
        config.training.batch_windows * source.context_length,
        config.training,
        folder,
        learning_rates=learner.learning_rates,
        after_step=learner.after_step,
        clipped_apart=learner.clipped_apart,
        measure=lambda num_windows: glance(student, source, evaluation, num_windows, ranks),
        watch=watch,
        ranks=ranks,
        blocks=student.blocks,
        may_idle=learner.may_idle,
    )
    teacher_size = parameters_text(teacher_folder)
    taught_by = f", taught by one of {teacher_size}" if teacher_size and config.online is None else ""
    model = f"{size.parameters:,} parameters{taught_by}"
    say_start(folder.name, model, device, config.training.precision, ranks)
    say_length(folder.name, config.training, source)
    trained = training.run()
    if isinstance(learner, CoTraining):
        end_of_text_id, teacher = source.end_of_text_id, learner.moving.teacher
        save_model(
            folder / CO_TEACHER,
            teacher,
            source.tokenizer_path,
            source.context_length,
            end_of_text_id,
            ranks,
            source.bos_id,
        )
    save_model(
        folder, student, source.tokenizer_path, source.context_length, source.end_of_text_id, ranks, source.bos_id
    )
    with training.weights_outside_blocks():
        validation = evaluate(student, source, evaluation, folder.name, ranks)
        say(f"{folder.name}: {validation.text}")
        test = evaluate_test(student, source, evaluation, folder.name, ranks)
    fingerprint = model_fingerprint(folder)
    summary = StudentSummary(
        validation=validation,
        test=test,
        train=trained,
        targets=source.kind,
        model=size,
        fingerprints={**inputs, "student": fingerprint},
        basis=basis(fingerprint, source, evaluation),
    )
    if ranks.is_first:
        write_atomically(folder / "summary.json", (summary.model_dump_json(indent=2) + "\n").encode())
    return summary


def model_size(student: LanguageModel) -> ModelSize:
    """Parameters and packed bytes of a student."""
    quantize, layers = student.quantize, student.quantized_linears().values()
    steps = sum(layer.log_step.numel() for layer in layers if layer.log_step is not None)
    parameters = sum(parameter.numel() for parameter in student.parameters()) - steps
    bits = None if quantize is None else quantize.packed_bits
    coded = sum(layer.latent.numel() for layer in layers) if bits else 0
    scales = sum(layer.num_scales for layer in layers)
    embedding = student.embedding_weight
    is_tied = coded and any(layer.latent.data_ptr() == embedding.data_ptr() for layer in layers)
    shared = 2 * embedding.numel() if is_tied else 0
    return ModelSize(
        parameters=parameters,
        ternary_parameters=coded if quantize is not None and quantize.is_ternary else 0,
        quantized_share=coverage(student).share,
        packed_bytes=-(-coded * (bits or 0) // 8) + 2 * (parameters - coded + scales) + shared,
    )
