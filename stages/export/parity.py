"""Whether an exported model says what its student says: both on the same held-out positions.

Shapes: T positions of a window, P of them that are compared, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

_FLOOR_NATS = -60.0
"""Log-probabilities below are taken for equal: runtimes give float32 probabilities, which end near e^-87."""


class Runtime(Protocol):
    """Something that computes a model."""

    @property
    def name(self) -> str:
        """What it is, and of which version."""
        ...

    def log_probs(self, ids_T: Tensor, positions_P: Tensor) -> Tensor:
        """log p of the id after each of these positions of a window, (P, V) float64, in nats."""
        ...


@dataclass(frozen=True)
class Parity:
    """Errors of an exported model q against a reference p, over all positions.

    A logit error is |log q_i - log p_i|: logits are compared after normalisation, as llama.cpp gives no others.
    """

    positions: int
    max_logit_error: float
    mean_logit_error: float
    kl_nats: float
    """Mean of KL(p || q)."""
    top1_agreement: float
    """Share of positions with the same most likely id."""
    reference_perplexity: float
    perplexity: float


@dataclass(frozen=True)
class Bounds:
    """What an export may differ by from a reference."""

    kl_nats: float
    top1_agreement: float
    max_logit_error: float | None = None

    def broken_by(self, parity: Parity) -> list[str]:
        """Every bound that does not hold, in words."""
        broken = []
        if not parity.kl_nats <= self.kl_nats:
            broken.append(f"KL of {parity.kl_nats:.2g} nats, expected at most {self.kl_nats:g}")
        if not parity.top1_agreement >= self.top1_agreement:
            broken.append(
                f"top-1 agreement of {parity.top1_agreement:.2%}, expected at least {self.top1_agreement:.1%}"
            )
        if self.max_logit_error is not None and not parity.max_logit_error <= self.max_logit_error:
            broken.append(
                f"logit error of up to {parity.max_logit_error:.2g}, expected at most {self.max_logit_error:g}"
            )
        return broken


FLOAT_BOUNDS = Bounds(kl_nats=1e-7, top1_agreement=0.999, max_logit_error=1e-2)
"""Both sides in float32 with the same weights: only the order of sums differs. Measured on trained students: logits
within 1e-5, KL 1e-13; left a factor of 1,000 for deeper and wilder ones."""

INT8_BOUNDS = Bounds(kl_nats=1e-3, top1_agreement=0.96)
"""Both sides round activations to 8 bits, where the order of sums flips a rounding here and there, and each flip goes
through all later layers. Measured on trained students: KL 4e-10 to 4e-7, agreement 99.9% to 100%, and the same between
float32 and float64 of one model; left a factor of 1,000 for deeper ones, and for ties among few positions. Queries and
keys in the wrong order: KL 0.2, agreement 71%; the scales inverted: KL 3, agreement 3% (docs/export.md). Weights are
compared apart, value by value, so that this needs to find only what computes otherwise."""

TRAINED_BOUNDS = Bounds(kl_nats=1e-2, top1_agreement=0.95)
"""From the student as it was trained, whatever the format: a runtime that rounds activations in another way than
training did changes every logit a little. Measured on trained students: KL 1e-7 to 1.2e-4, agreement 98.8% to 100%;
left a factor of 100 in KL. What is past this is not that student, even where the runtime makes no mistake: where
training rounded nothing and one channel of activations is far larger than all others, 8 bits leave nothing of
the others, and KL is several nats."""


@dataclass(frozen=True)
class HeldOut:
    """Windows that no training saw: ids and their next ids, (T,) each."""

    ids: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]


def measure_parity(
    exported: Runtime, references: Sequence[Runtime], text: HeldOut, positions_per_window: int
) -> list[Parity]:
    """Parity with each of the references, at so many positions of each window at most."""
    sums = [_Sums() for _ in references]
    for ids_T, labels_T in zip(text.ids, text.labels, strict=True):
        positions_P = spread_positions(len(ids_T), positions_per_window)
        exported_PV = exported.log_probs(ids_T, positions_P)
        for reference, sum_ in zip(references, sums, strict=True):
            sum_.add(reference.log_probs(ids_T, positions_P), exported_PV, labels_T[positions_P])
    return [sum_.parity() for sum_ in sums]


class _Sums:
    def __init__(self) -> None:
        self._positions = self._entries = 0
        self._largest = self._error = self._kl = self._agreement = self._loss = self._reference_loss = 0.0

    def add(self, reference_PV: Tensor, exported_PV: Tensor, labels_P: Tensor) -> None:
        p_PV, q_PV = (log_probs.clamp(min=_FLOOR_NATS) for log_probs in (reference_PV, exported_PV))
        error_PV = (q_PV - p_PV).abs()
        self._positions += len(labels_P)
        self._entries += error_PV.numel()
        self._largest = max(self._largest, float(error_PV.nan_to_num(nan=math.inf).max()))
        self._error += float(error_PV.sum())
        self._kl += float((p_PV.exp() * (p_PV - q_PV)).sum())
        self._agreement += float((p_PV.argmax(-1) == q_PV.argmax(-1)).sum())
        self._reference_loss -= float(p_PV.gather(-1, labels_P[:, None]).sum())
        self._loss -= float(q_PV.gather(-1, labels_P[:, None]).sum())

    def parity(self) -> Parity:
        return Parity(
            positions=self._positions,
            max_logit_error=self._largest,
            mean_logit_error=self._error / self._entries,
            kl_nats=max(self._kl / self._positions, 0.0) if math.isfinite(self._kl) else math.inf,
            top1_agreement=self._agreement / self._positions,
            reference_perplexity=math.exp(self._reference_loss / self._positions),
            perplexity=math.exp(self._loss / self._positions),
        )


def as_numbers(parity: Parity) -> dict[str, float]:
    """By name, for JSON."""
    return asdict(parity)


def spread_positions(context_length: int, most: int) -> Tensor:
    """At most so many positions, evenly from the first to the last but one, (P,): the last would want a longer window.

    llama.cpp feeds a prompt of at most context_length - 1 ids, for it wants room for the next one.
    """
    last = max(context_length - 2, 0)
    return torch.linspace(0, last, min(most, last + 1)).round().long()
