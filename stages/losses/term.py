"""The seam between loss terms on distributions and the head that computes them chunk by chunk."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stages.losses.target import HeadTarget


class DistributionTerm(Protocol):
    """One divergence between student and labels or teacher. Implementations are frozen dataclasses."""

    @property
    def name(self) -> str:
        """Key in logs and summaries."""
        ...

    @property
    def needs_teacher(self) -> bool:
        """Whether `target` is looked at."""
        ...

    def per_position(self, logits_NV: Tensor, labels_N: Tensor, target: HeadTarget | None) -> Tensor:
        """The term at each position in nats, (N,) float32, differentiable with respect to `logits_NV` (float32)."""
        ...


@dataclass(frozen=True)
class WeightedTerm:
    """A term and its weight in the total."""

    weight: float
    term: DistributionTerm


@dataclass(frozen=True)
class LossValues:
    """A differentiable total, and the plain value of every term before its weight, all means over positions."""

    total: Tensor
    terms: dict[str, Tensor]
