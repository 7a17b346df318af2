"""Trains the teacher and leaves a folder that transformers loads as `LlamaForCausalLM`."""

from pathlib import Path

import torch

from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.evaluate.evaluate import basis, evaluate, evaluate_test, glance
from tristill.stages.losses.chunked_head import chunked_head_loss
from tristill.stages.losses.cross_entropy import CrossEntropy
from tristill.stages.losses.term import LossValues, WeightedTerm
from tristill.stages.models.checkpoint import pick_device, save_model
from tristill.stages.models.origin import model_fingerprint
from tristill.stages.models.transformer import Transformer, compile_model
from tristill.stages.progress import say
from tristill.stages.ranks import current_ranks
from tristill.stages.targets.online import OnlineSource
from tristill.stages.targets.source import Signals, TargetBatch, counted_by_all, endless_batches
from tristill.stages.teacher.config import TeacherConfig
from tristill.stages.teacher.summary import TeacherSummary
from tristill.stages.training.loop import StepInfo, Training
from tristill.stages.training.start_line import say_length, say_start


def train_teacher(config: TeacherConfig, data_folder: Path, folder: Path, evaluation: EvaluateConfig) -> TeacherSummary:
    """Train, save, evaluate; resumes from the last checkpoint in `folder`. All ranks must call it."""
    ranks = current_ranks()
    shape, settings = config.model, config.training
    assert shape is not None, "a teacher that is given is not trained"
    assert settings is not None, "a teacher that is given is not trained"
    device = pick_device(settings.device)
    source = OnlineSource(data_folder, device)
    model = Transformer(shape, source.vocab_size)
    model.initialize(torch.Generator().manual_seed(settings.seed))
    model.to(device)
    if settings.compile:
        compile_model(model)
    terms = [WeightedTerm(1.0, CrossEntropy())]

    def compute_loss(batch: TargetBatch, info: StepInfo) -> LossValues:  # noqa: ARG001
        final_ND, labels_N = batch.counted(model(batch.input_ids_BT).final_BTD), batch.counted(batch.labels_BT)
        divisor = counted_by_all(batch, ranks) / ranks.world_size
        return chunked_head_loss(final_ND, model.head_weight, labels_N, None, terms, num_positions=divisor)

    training = Training(
        "teacher",
        model,
        compute_loss,
        endless_batches(source, settings.batch_windows, Signals(), settings.seed, ranks=ranks),
        settings.batch_windows * source.context_length,
        settings,
        folder,
        measure=lambda num_windows: glance(model, source, evaluation, num_windows, ranks),
        ranks=ranks,
        blocks=model.blocks,
    )
    say_start("teacher", f"{shape.parameters(source.vocab_size):,} parameters", device, settings.precision, ranks)
    say_length("teacher", settings, source)
    trained = training.run()
    save_model(folder, model, source.tokenizer_path, source.context_length, source.end_of_text_id, ranks, source.bos_id)
    with training.weights_outside_blocks():
        validation = evaluate(model, source, evaluation, "teacher", ranks)
        say(f"teacher: {validation.text}")
        test = evaluate_test(model, source, evaluation, "teacher", ranks)
    fingerprint = model_fingerprint(folder)
    summary = TeacherSummary(
        validation=validation,
        test=test,
        train=trained,
        parameters=shape.parameters(source.vocab_size),
        fingerprint=fingerprint,
        basis=basis(fingerprint, source, evaluation),
    )
    if ranks.is_first:
        summary.save(folder)
    return summary
