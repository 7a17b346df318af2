"""Divergences to a mixture of teacher and student: generalised Jensen-Shannon, skew KL. Finite wherever q is.

Shapes: N positions, C cells.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tristill.stages.losses.cells import Cells
from tristill.stages.losses.divergence import Divergence
from tristill.stages.losses.mixed import log_mixture


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1.

    Agarwal et al. 2024, GKD (arXiv 2306.13649), equation 1: towards forward KL as beta goes to 0, towards reverse KL
    as it goes to 1, both times beta (1 - beta) in size.
    """

    beta: float = 0.5
    name: ClassVar[str] = "jensen_shannon"

    def compare(self, cells: Cells, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """See Divergence; the slope is (1 - beta) q log(q / m)."""
        del labels_N
        log_m_NC = _log_m(cells.log_p_NC, self.beta, cells.log_q_NC)
        slope_NC = (1 - self.beta) * cells.log_q_NC.exp() * (cells.log_q_NC - log_m_NC)
        teacher_NC = self.beta * cells.log_p_NC.exp() * (cells.log_p_NC - log_m_NC)
        return (teacher_NC + slope_NC).sum(dim=-1), slope_NC


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(p || m), m = skew p + (1 - skew) q, 0 <= skew < 1.

    Ko et al. 2024, DistiLLM (arXiv 2402.03898), equation 2; theirs is skew 0.1.
    """

    skew: float = 0.1
    name: ClassVar[str] = "skew_forward_kl"

    def compare(self, cells: Cells, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """See Divergence; the slope is -(1 - skew) p q / m."""
        del labels_N
        log_m_NC = _log_m(cells.log_p_NC, self.skew, cells.log_q_NC)
        value_N = (cells.log_p_NC.exp() * (cells.log_p_NC - log_m_NC)).sum(dim=-1)
        return value_N, (cells.log_p_NC + cells.log_q_NC - log_m_NC).exp_().mul_(self.skew - 1)


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q || m), m = (1 - skew) p + skew q, 0 <= skew < 1.

    Ko et al. 2024, DistiLLM (arXiv 2402.03898), equation 3; theirs is skew 0.1.
    """

    skew: float = 0.1
    name: ClassVar[str] = "skew_reverse_kl"

    def compare(self, cells: Cells, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """See Divergence; the slope is q log(q / m) - skew q^2 / m, up to a multiple of q."""
        del labels_N
        log_q_NC = cells.log_q_NC
        log_m_NC = _log_m(cells.log_p_NC, 1 - self.skew, log_q_NC)
        each_NC = log_q_NC.exp() * (log_q_NC - log_m_NC)
        return each_NC.sum(dim=-1), each_NC - self.skew * (2 * log_q_NC - log_m_NC).exp()


def _log_m(log_p_NC: Tensor, share: float, log_q_NC: Tensor) -> Tensor:
    """log(share p + (1 - share) q)."""
    return log_mixture((log_p_NC, log_q_NC), (share, 1 - share))
