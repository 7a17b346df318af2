"""Forward KL divergence from teacher to student, on every kind of target.

Shapes: N positions, C cells, K draws.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tristill.stages.losses.cells import Cells
from tristill.stages.losses.divergence import Divergence
from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import DrawnTarget, Target


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p_tau || q_tau) = sum_i p_i log(p_i / q_i), in nats, p the teacher's, q the student's, both at tau.

    Hinton et al. 2015 (arXiv 1503.02531); their factor tau^2 is the caller's weight. On a head with a tail the sum
    runs over the K head entries and one bucket, p_tail = 1 - sum of p_i and q_tail likewise: by the log sum
    inequality a lower bound of the full divergence, zero if and only if head and tail mass agree; nothing is taught
    about the tail's shape. On draws it is the estimate -sum_i share_i log q_i - H(p): its mean over draws is the
    divergence and so is its gradient, but at a single position it may be negative. The gradient in the logits is (q -
    p) / tau.
    """

    name: ClassVar[str] = "forward_kl"
    sign: ClassVar[float] = -1.0

    def per_position(
        self, student: StudentChunk, labels_N: Tensor, target: Target | None, weight: float | Tensor = 1.0
    ) -> Tensor:
        """See DistributionTerm."""
        if isinstance(target, DrawnTarget):
            return self._drawn(student, target, weight)
        return super().per_position(student, labels_N, target, weight)

    def total_slope(self, cells: Cells) -> float | None:
        """The sum of p."""
        return 1.0 if cells.sums_to_one else None

    def compare(self, cells: Cells, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """See Divergence; the slope is -p."""
        del labels_N
        p_NC = cells.log_p_NC.exp()
        is_large = cells.ids_NK is None
        ratio_NC = cells.log_p_NC.sub_(cells.log_q_NC) if is_large else cells.log_p_NC - cells.log_q_NC
        return ratio_NC.mul_(p_NC).sum(dim=-1), p_NC

    def _drawn(self, student: StudentChunk, target: DrawnTarget, weight: float | Tensor) -> Tensor:
        assert self.temperature == target.temperature, "draws serve their own temperature only"
        log_q_NK = student.log_q(self.temperature).gather(-1, target.ids_NK)
        if student.wants_gradient:
            scale = weight / self.temperature
            student.add_softmax(self.temperature, scale)
            student.add_at(target.ids_NK, target.shares_NK * -scale)
        return -(target.shares_NK * log_q_NK).sum(dim=-1) - target.entropy_N
