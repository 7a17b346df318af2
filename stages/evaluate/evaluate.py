"""Evaluates a model on a held-out split of a source."""

from collections.abc import Callable

import torch

from tristill.cache.hashing import fingerprint_of
from tristill.cache.spec import SplitName
from tristill.stages.collectives import sum_of
from tristill.stages.errors import CorpusError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.evaluate.metrics import Documents, MetricSums, Unit, UnitSums, ValidationMetrics
from tristill.stages.losses.chunked_head import chunks
from tristill.stages.models.language_model import LanguageModel, finite_features, require_finite, require_positions
from tristill.stages.progress import Progress, say
from tristill.stages.ranks import ALONE, Ranks
from tristill.stages.targets.source import Epoch, Signals, TargetSource


def evaluate(
    model: LanguageModel,
    source: TargetSource,
    config: EvaluateConfig,
    label: str,
    ranks: Ranks = ALONE,
    split: SplitName = "validation",
) -> ValidationMetrics:
    """Metrics of `model` over every window of a split, computed in float32; against the teacher if the source has one.

    Of positions that count. The model stays on its device and is left in evaluation mode. Ranks share the windows, and
    all have the metrics of all.
    """
    require_positions(model, source.context_length)
    total = source.num_windows(split) * source.context_length
    with Progress(f"evaluate {label}", total, "positions") as progress:
        return _measure(model, source, config, None, progress.advance, ranks, label, split)


def evaluate_test(
    model: LanguageModel, source: TargetSource, config: EvaluateConfig, label: str, ranks: Ranks = ALONE
) -> ValidationMetrics | None:
    """The same on the test split, said; None if there is none."""
    if "test" not in source.splits:
        return None
    metrics = evaluate(model, source, config, f"{label} on the test split", ranks, "test")
    say(f"{label}, test split: {metrics.text}")
    return metrics


def basis(fingerprint: str, source: TargetSource, config: EvaluateConfig) -> str | None:
    """What the metrics of a model follow from: its weights, the windows and targets, and the settings."""
    return fingerprint_of([fingerprint, source.identity, config.numbers()]) if source.identity else None


def glance(
    model: LanguageModel, source: TargetSource, config: EvaluateConfig, num_windows: int, ranks: Ranks = ALONE
) -> ValidationMetrics:
    """As `evaluate`, over about the first `num_windows` validation windows, in whole batches, and quietly.

    Over more of them where no position of the first ones counts; without standard errors.
    """
    num_batches = -(-num_windows // (config.batch_windows * ranks.world_size))
    return _measure(model, source, config, num_batches, _unseen, ranks, "the model")


def _unseen(num_positions: int) -> None:
    """What progress is there to tell of a glance."""


@torch.no_grad()
def _measure(
    model: LanguageModel,
    source: TargetSource,
    config: EvaluateConfig,
    num_batches: int | None,
    advance: Callable[[int], None],
    ranks: Ranks,
    whose: str,
    split: SplitName = "validation",
) -> ValidationMetrics:
    model.eval()
    documents = Documents(source, split) if num_batches is None else None  # a glance has no standard errors
    most: dict[Unit, int] = {} if documents is None else {"document": documents.most, "window": documents.num_windows}
    sums = MetricSums(config.calibration_bins, source.temperature, [UnitSums(unit, most[unit]) for unit in most])
    num_windows, batch_windows = source.num_windows(split), config.batch_windows * ranks.world_size
    batches = source.batches(split, batch_windows, Signals(targets=True), Epoch(ranks=ranks))
    for first in range(0, num_windows, batch_windows):
        batch = next(batches, None)
        if batch is None:  # the others may need this rank's part of the weights for the last windows
            device = model.embedding_weight.device
            model(torch.zeros(1, source.context_length, dtype=torch.int64, device=device))
            break
        final_ND = batch.counted(finite_features(model, batch.input_ids_BT, whose=whose).final_BTD)
        labels_N = batch.counted(batch.labels_BT)
        own_first = first + min(batch_windows, num_windows - first) * ranks.rank // ranks.world_size  # see Deal
        numbers_BT = documents.of(own_first, batch.input_ids_BT) if documents else ()
        numbers_N = [batch.counted(one_BT) for one_BT in numbers_BT]
        for rows in chunks(len(final_ND), model.vocab_size):
            logits_NV = model.logits_of(final_ND[rows])
            target = None if batch.targets is None else batch.targets.chunk(rows)
            sums.add(logits_NV, labels_N[rows], target, [one_N[rows] for one_N in numbers_N])
        advance(min(batch_windows, num_windows - first) * source.context_length)
        is_sampled = num_batches is not None and num_batches * batch_windows <= first + batch_windows < num_windows
        if is_sampled and sum_of(sums.positions, ranks):
            break
    sums = sums.summed(ranks)
    if not sums.positions:
        raise CorpusError(
            f"the {split} split: found no position that counts, so that its metrics would be of nothing; give more "
            "chats, or change data.validation_fraction, and run `tristill tokenize` again"
        )
    metrics = sums.metrics(source.bytes_per_token(split), ranks)
    require_finite(model.embedding_weight.dtype, torch.tensor(metrics.loss_nats), f"{whose}: the losses of its logits")
    return metrics
