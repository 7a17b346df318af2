"""Evaluates a model on the validation split of a source."""

import torch

from stages.evaluate.config import EvaluateConfig
from stages.evaluate.metrics import MetricSums, ValidationMetrics
from stages.losses.chunked_head import chunks
from stages.models.transformer import Transformer
from stages.progress import Progress
from stages.targets.source import Epoch, Signals, TargetSource


@torch.no_grad()
def evaluate(model: Transformer, source: TargetSource, config: EvaluateConfig, label: str) -> ValidationMetrics:
    """Metrics of `model` over every validation window, computed in float32; against the teacher if the source has one.

    Of positions that count. The model stays on its device and is left in evaluation mode.
    """
    model.eval()
    sums = MetricSums(config.calibration_bins, source.temperature)
    total = source.num_windows("validation") * source.context_length
    with Progress(f"evaluate {label}", total, "positions") as progress:
        for batch in source.batches("validation", config.batch_windows, Signals(targets=True), Epoch()):
            final_ND = batch.counted(model(batch.input_ids_BT).final_BTD)
            labels_N = batch.counted(batch.labels_BT)
            for rows in chunks(len(final_ND), model.vocab_size):
                logits_NV = (final_ND[rows] @ model.head_weight.T).float()
                target = None if batch.targets is None else batch.targets.chunk(rows)
                sums.add(logits_NV, labels_N[rows], target)
            progress.advance(batch.labels_BT.numel())
    return sums.metrics(source.bytes_per_token("validation"))
