"""Held-out metrics, each with its definition; docs/methods.md has the formulas.

Shapes: N positions, V vocabulary, K head entries, M calibration bins.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tristill.cache.spec import SplitName
from tristill.stages.collectives import summed
from tristill.stages.losses.cells import AnyHeadTarget
from tristill.stages.losses.cross_entropy import CrossEntropy
from tristill.stages.losses.forward_kl import ForwardKL
from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import DrawnTarget, FullTarget, Target
from tristill.stages.ranks import ALONE, Ranks
from tristill.stages.targets.source import Epoch, Signals, TargetSource

Unit = Literal["document", "window"]
_FEW_DOCUMENTS, _WINDOWS_READ = 10, 64


class StandardErrors(BaseModel):
    """Standard errors of means over positions, for a sample of `num_units` documents or windows.

    Of a ratio of sums over units (Cochran 1977, Sampling Techniques, section 2.11): with unit c's sum s_c over its n_c
    positions and the mean m, sqrt(C / (C - 1) * sum_c (s_c - m n_c)^2) / sum_c n_c. None where the mean is, or is
    infinite.
    """

    model_config = ConfigDict(frozen=True)

    unit: Unit
    num_units: int
    loss_nats: float | None
    kl_to_teacher_nats: float | None
    top1_agreement: float | None


class UnitSums:
    """Positions, loss, KL and agreement summed by unit, in float64."""

    def __init__(self, unit: Unit, num_units: int) -> None:
        """`num_units`: that there can be; those without any position are not counted."""
        self.unit: Unit = unit
        self._sums_4C = torch.zeros(4, num_units, dtype=torch.float64)

    def add(self, units_N: Tensor, loss_N: Tensor, kl_N: Tensor | None, agreement_N: Tensor | None) -> None:
        """Count positions; `units_N` says of which document or window each is."""
        nothing_N = torch.zeros_like(loss_N)
        values = [torch.ones_like(loss_N), loss_N, *(nothing_N if one is None else one for one in (kl_N, agreement_N))]
        self._sums_4C.index_add_(1, units_N.cpu(), torch.stack([value.double() for value in values]).cpu())

    def errors(self, ranks: Ranks, *, has_kl: bool, has_agreement: bool) -> StandardErrors | None:
        """Of the means over the units of all ranks; None for too few units."""
        sums_4C = summed(self._sums_4C, ranks)
        count_C, sums_3C = sums_4C[0], sums_4C[1:]
        num_units = int((count_C > 0).sum())
        if num_units < (_FEW_DOCUMENTS if self.unit == "document" else 2):
            return None
        means_3 = sums_3C.sum(dim=1) / count_C.sum()
        squares_3 = (sums_3C - means_3[:, None] * count_C).square().sum(dim=1)
        errors_3 = (squares_3 * num_units / (num_units - 1)).sqrt() / count_C.sum()
        loss, kl, agreement = (value if math.isfinite(value) else None for value in errors_3.tolist())
        return StandardErrors(
            unit=self.unit,
            num_units=num_units,
            loss_nats=loss,
            kl_to_teacher_nats=kl if has_kl else None,
            top1_agreement=agreement if has_agreement else None,
        )


class Documents:
    """Numbers the documents of held-out windows, which stand in the order of the text, each with a token at its end."""

    def __init__(self, source: TargetSource, split: SplitName) -> None:
        """Reads the ids of all windows, and nothing of the teacher."""
        self._end_of_text_id = source.end_of_text_id
        ends = [torch.zeros(1, dtype=torch.int64)]
        for batch in source.batches(split, _WINDOWS_READ, Signals(), Epoch()):
            inside_B = (batch.input_ids_BT == self._end_of_text_id).sum(dim=1)
            ends.append((inside_B + (batch.labels_BT[:, -1] == self._end_of_text_id)).cpu())
        self._before_W1 = torch.cat(ends).cumsum(dim=0)
        self.num_windows, self.most = len(self._before_W1) - 1, int(self._before_W1[-1]) + 1

    def of(self, first_window: int, input_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each label's document and of its window, (B, T); numbers of documents may have gaps."""
        windows_B = torch.arange(first_window, first_window + len(input_ids_BT))
        ends_BT = (input_ids_BT == self._end_of_text_id).cumsum(dim=1)
        before_B1, windows_B1 = (found.to(ends_BT.device)[:, None] for found in (self._before_W1[windows_B], windows_B))
        return before_B1 + ends_BT, windows_B1.expand_as(ends_BT)


class CalibrationBin(BaseModel):
    """Positions whose most likely token has a probability between two edges: m / M to (m + 1) / M for bin m of M.

    accuracy: share of them at which that token is the label. confidence: mean of its probability. Both None in a bin
    with no position. The expected calibration error is the mean of |accuracy - confidence| over positions.
    """

    model_config = ConfigDict(frozen=True)

    count: int
    accuracy: float | None
    confidence: float | None


class ValidationMetrics(BaseModel):
    """Means over all positions of the validation split that count; teacher columns are None where no teacher is known.

    Draws from the teacher say how far the student is from it on average, but not what it finds most likely at a
    position: with a `sampled` cache, agreement and acceptance are None. calibration: the bins in their order, None in
    summaries that were written before they were kept. standard_errors: None of a single window, or of a glance.
    """

    model_config = ConfigDict(frozen=True)

    positions: int
    loss_nats: float
    perplexity: float
    bits_per_byte: float
    expected_calibration_error: float
    kl_to_teacher_nats: float | None
    top1_agreement: float | None
    acceptance_rate: float | None
    teacher_temperature: float | None
    calibration: tuple[CalibrationBin, ...] | None = None
    standard_errors: StandardErrors | None = None

    def numbers(self) -> dict[str, float]:
        """The finite means by name, without what they are of."""
        left_out = {"positions", "teacher_temperature", "calibration", "standard_errors"}
        found = self.model_dump(exclude=left_out)
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}

    @property
    def text(self) -> str:
        """The main figures in a line."""
        parts = [f"perplexity {self.perplexity:.2f}", f"{self.bits_per_byte:.4f} bits/byte"]
        if self.kl_to_teacher_nats is not None:
            parts.append(f"KL to the teacher {self.kl_to_teacher_nats:.4f} nats")
        if self.top1_agreement is not None:
            parts.append(f"top-1 agreement {self.top1_agreement:.1%}")
        return f"{', '.join(parts)} over {self.positions:,} held-out positions"


class MetricSums:
    """Adds positions chunk by chunk in float64; what comes out does not depend on how they were cut.

    positions: how many so far.
    """

    def __init__(self, calibration_bins: int, temperature: float, units: Sequence[UnitSums] = ()) -> None:
        """`units`: sums by document or window, of which the first with enough of them gives standard errors."""
        self._temperature = temperature
        self.positions = 0
        self._teacher_positions = self._compared_positions = 0
        self._loss = self._kl = self._agreement = self._acceptance = 0.0
        self._bins = calibration_bins
        self._calibration_3M = torch.zeros(3, calibration_bins, dtype=torch.float64)
        self._units = units

    def add(self, logits_NV: Tensor, labels_N: Tensor, target: Target | None, numbers_N: Sequence[Tensor] = ()) -> None:
        """Count the positions of one chunk; logits in float32. numbers_N: of each position's document or window."""
        self.positions += len(labels_N)
        student = StudentChunk(logits_NV)
        loss_N = CrossEntropy().per_position(student, labels_N, None)
        self._loss += float(loss_N.double().sum())
        top_N = logits_NV.argmax(dim=-1)
        confidence_N = torch.softmax(logits_NV, dim=-1).amax(dim=-1).double()
        bins_N = (confidence_N * self._bins).long().clamp_(max=self._bins - 1)
        counts_3N = torch.stack([torch.ones_like(confidence_N), (top_N == labels_N).double(), confidence_N])
        self._calibration_3M.index_add_(1, bins_N.cpu(), counts_3N.cpu())
        kl_N = agreement_N = None
        if target is not None:
            self._teacher_positions += len(labels_N)
            kl_N = ForwardKL(self._temperature).per_position(student, labels_N, target)
            self._kl += float(kl_N.double().sum())
            if not isinstance(target, DrawnTarget):
                self._compared_positions += len(labels_N)
                agreement_N = top_N == target.top1()
                self._agreement += float(agreement_N.sum())
                self._acceptance += float(acceptance(logits_NV, target, self._temperature).double().sum())
        for units, units_N in zip(self._units, numbers_N, strict=True):
            units.add(units_N, loss_N, kl_N, agreement_N)

    def summed(self, ranks: Ranks) -> "MetricSums":
        """The sums of all ranks, on each of them; those by document stay where they are."""
        counts = (self.positions, self._teacher_positions, self._compared_positions)
        own = torch.tensor([*counts, self._loss, self._kl, self._agreement, self._acceptance], dtype=torch.float64)
        total = summed(torch.cat([own, self._calibration_3M.flatten()]), ranks)
        found = MetricSums(self._bins, self._temperature, self._units)
        found.positions, found._teacher_positions, found._compared_positions = (int(n) for n in total[:3])
        found._loss, found._kl, found._agreement, found._acceptance = total[3:7].tolist()
        found._calibration_3M = total[7:].view(3, self._bins)
        return found

    def metrics(self, bytes_per_token: float, ranks: Ranks = ALONE) -> ValidationMetrics:
        """The means so far, of one position at least. `ranks`: those whose sums these are, which all must call it."""
        loss_nats = self._loss / self.positions
        taught, compared = self._teacher_positions, self._compared_positions
        count_M, correct_M, confidence_M = self._calibration_3M
        spreads = [one.errors(ranks, has_kl=bool(taught), has_agreement=bool(compared)) for one in self._units]
        calibration_error = float((correct_M - confidence_M).abs().sum() / count_M.sum())
        return ValidationMetrics(
            positions=self.positions,
            loss_nats=loss_nats,
            perplexity=math.exp(min(loss_nats, 700.0)),
            bits_per_byte=loss_nats / math.log(2) / bytes_per_token,
            expected_calibration_error=calibration_error,
            kl_to_teacher_nats=self._kl / taught if taught else None,
            top1_agreement=self._agreement / compared if compared else None,
            acceptance_rate=self._acceptance / compared if compared else None,
            teacher_temperature=self._temperature if taught else None,
            standard_errors=next((errors for errors in spreads if errors is not None), None),
            calibration=tuple(map(_calibration_bin, count_M.tolist(), correct_M.tolist(), confidence_M.tolist())),
        )


def _calibration_bin(count: float, correct: float, confidence: float) -> CalibrationBin:
    """From sums over the bin's positions."""
    if not count:
        return CalibrationBin(count=0, accuracy=None, confidence=None)
    return CalibrationBin(count=int(count), accuracy=correct / count, confidence=confidence / count)


def acceptance(logits_NV: Tensor, target: AnyHeadTarget | FullTarget, temperature: float) -> Tensor:
    """sum_i min(p_i, q_i) at each position, (N,): how often speculative decoding keeps a token that q drafts for p.

    Leviathan et al. 2023 (arXiv 2211.17192), theorem 3.5. A tail counts as one bucket, which makes this an upper bound.
    """
    q_NV = torch.softmax(logits_NV / temperature, dim=-1)
    if not isinstance(target, AnyHeadTarget):
        return torch.minimum(target.log_probs(temperature).exp(), q_NV).sum(dim=-1)
    head_log_probs_NK, tail_log_prob_N = target.log_probs(temperature)
    q_NK = q_NV.gather(-1, target.head_ids_NK).masked_fill_(head_log_probs_NK.isneginf(), 0)
    accepted_N = torch.minimum(head_log_probs_NK.exp(), q_NK).sum(dim=-1)
    if tail_log_prob_N is None:
        return accepted_N
    q_tail_N = (1 - q_NK.sum(dim=-1)).clamp_(min=0)
    return accepted_N + torch.minimum(tail_log_prob_N.exp(), q_tail_N)
