"""Trains the teacher and leaves a folder that transformers loads as `LlamaForCausalLM`."""

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from cache.atomic import write_atomically
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluate import evaluate
from stages.evaluate.metrics import ValidationMetrics
from stages.losses.chunked_head import chunked_head_loss
from stages.losses.cross_entropy import CrossEntropy
from stages.losses.term import LossValues, WeightedTerm
from stages.models.folder import model_fingerprint, pick_device, save_model
from stages.models.transformer import Transformer
from stages.targets.online import OnlineSource
from stages.targets.source import Signals, TargetBatch, endless_batches
from stages.teacher.config import TeacherConfig
from stages.training.loop import StepInfo, Training, TrainingSummary


class TeacherSummary(BaseModel):
    """`summary.json` of a teacher."""

    model_config = ConfigDict(frozen=True)

    validation: ValidationMetrics
    train: TrainingSummary
    parameters: int
    fingerprint: str


def train_teacher(config: TeacherConfig, data_folder: Path, folder: Path, evaluation: EvaluateConfig) -> TeacherSummary:
    """Train, save, evaluate; resumes from the last checkpoint in `folder`."""
    device = pick_device(config.training.device)
    source = OnlineSource(data_folder, device)
    model = Transformer(config.model, source.vocab_size)
    model.initialize(torch.Generator().manual_seed(config.training.seed))
    model.to(device)
    terms = [WeightedTerm(1.0, CrossEntropy())]

    def compute_loss(batch: TargetBatch, info: StepInfo) -> LossValues:  # noqa: ARG001
        final_ND = model(batch.input_ids_BT).final_BTD.flatten(0, 1)
        return chunked_head_loss(final_ND, model.head_weight, batch.labels_BT.flatten(), None, terms)

    training = Training(
        "teacher",
        model,
        compute_loss,
        endless_batches(source, config.training.batch_windows, Signals(), config.training.seed),
        config.training.batch_windows * source.context_length,
        config.training,
        folder,
    )
    trained = training.run()
    save_model(folder, model, source.tokenizer_path, source.context_length, source.end_of_text_id)
    summary = TeacherSummary(
        validation=evaluate(model, source, evaluation, "teacher"),
        train=trained,
        parameters=config.model.parameters(source.vocab_size),
        fingerprint=model_fingerprint(folder),
    )
    write_atomically(folder / "summary.json", (summary.model_dump_json(indent=2) + "\n").encode())
    training.clear_checkpoints()
    return summary
