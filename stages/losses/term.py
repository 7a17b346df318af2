"""The seam between loss terms on distributions and the head that computes them chunk by chunk."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stages.losses.student import StudentChunk
from stages.losses.target import Target


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

    def per_position(self, student: StudentChunk, labels_N: Tensor, target: Target | None, weight: float = 1) -> Tensor:
        """The term at each position in nats, (N,), in the type of the logits.

        If the student wants a gradient, that of weight * (sum over positions) is added to it, in closed form.
        """
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
