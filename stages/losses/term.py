"""The seam between loss terms on distributions and the head that computes them chunk by chunk."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import Target


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

    def per_position(
        self, student: StudentChunk, labels_N: Tensor, target: Target | None, weight: float | Tensor = 1.0
    ) -> Tensor:
        """The term at each position in nats, (N,), in the type of the logits.

        If the student wants a gradient, that of the sum over positions of weight * term is added to it, in closed form;
        weight is a number, or (N, 1).
        """
        ...


@dataclass(frozen=True)
class WeightedTerm:
    """A term, its weight in the total, and what logs call it: the term's own name if None."""

    weight: float
    term: DistributionTerm
    label: str | None = None

    @property
    def name(self) -> str:
        """Key in logs and summaries."""
        return self.label or self.term.name


@dataclass(frozen=True)
class LossValues:
    """A differentiable total, and the plain value of every term before its weight, all means over positions.

    telemetry: further numbers to log, by what they are and by term; only of steps that are logged.
    """

    total: Tensor
    terms: dict[str, Tensor]
    telemetry: dict[str, dict[str, float]] = field(default_factory=dict)
