"""The base of all divergences between the teacher's distribution and the student's.

Shapes: N positions, C cells.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tristill.stages.losses.cells import Cells
from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import Target, ordered


@dataclass(frozen=True)
class Divergence(ABC):
    """A sum over cells of a function of log p and log q at one temperature, in nats; see DistributionTerm."""

    temperature: float
    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    sign: ClassVar[float] = 1.0
    """Of the slope, which saves a pass over it where the formula has a minus."""

    def per_position(
        self, student: StudentChunk, labels_N: Tensor, target: Target | None, weight: float | Tensor = 1.0
    ) -> Tensor:
        """See DistributionTerm."""
        cells = Cells.of(student, ordered(target), self.temperature)
        value_N, slope_NC = self.compare(cells, labels_N)
        if student.wants_gradient:
            cells.add_gradient(slope_NC, self.sign * weight, self.total_slope(cells))
        return value_N

    def total_slope(self, cells: Cells) -> float | None:  # noqa: ARG002
        """The sum of the slopes of every row, where it is known beforehand."""
        return None

    @abstractmethod
    def compare(self, cells: Cells, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """(value_N, slope_NC): the divergence, and its derivative in each log q, all of them taken as independent.

        The slope is sign * slope_NC. What the cells hold of the teacher may be overwritten. The student's
        probabilities sum to one, so a multiple of q added to the slope changes no gradient.
        """
