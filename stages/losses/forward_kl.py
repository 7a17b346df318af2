"""Forward KL divergence from teacher to student, on every kind of target.

Shapes: N positions, K head entries, V vocabulary. u = logits / tau.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.losses.student import StudentChunk
from stages.losses.target import DrawnTarget, HeadTarget, Target

_LARGEST_HEAD_MASS = 0.99
"""Beyond it, one minus the head's mass has lost too many digits to stand for the tail's."""


@dataclass(frozen=True)
class ForwardKL:
    """KL(p_tau || q_tau) = sum_i p_i log(p_i / q_i), in nats, p the teacher's, q the student's, both at tau.

    Hinton et al. 2015 (arXiv 1503.02531); their factor tau^2 is the caller's weight. On a head with a tail the sum
    runs over the K head entries and one bucket, p_tail = 1 - sum of p_i and q_tail likewise: by the log sum
    inequality a lower bound of the full divergence, zero if and only if head and tail mass agree; nothing is taught
    about the tail's shape. On draws it is the estimate -sum_i share_i log q_i - H(p): its mean over draws is the
    divergence and so is its gradient, but at a single position it may be negative. The gradient in the logits is (q -
    p) / tau.
    """

    temperature: float
    name: str = "forward_kl"
    needs_teacher: bool = True

    def per_position(
        self,
        student: StudentChunk,
        labels_N: Tensor,  # noqa: ARG002
        target: Target | None,
        weight: float = 1,
    ) -> Tensor:
        """See DistributionTerm."""
        assert target is not None
        scale = weight / self.temperature
        if isinstance(target, DrawnTarget):
            assert self.temperature == target.temperature, "draws serve their own temperature only"
            return self._sparse(student, target.ids_NK, target.shares_NK, scale) - target.entropy_N
        if not isinstance(target, HeadTarget):
            return self._full(student, target.log_probs(self.temperature), scale)
        log_p_NK, log_p_tail_N = target.log_probs(self.temperature)
        if log_p_tail_N is None:
            p_NK = log_p_NK.exp()
            return self._sparse(student, target.head_ids_NK, p_NK, scale) + torch.xlogy(p_NK, p_NK).sum(dim=-1)
        return self._bucket(student, target.head_ids_NK, log_p_NK, log_p_tail_N, scale)

    def _sparse(self, student: StudentChunk, ids_NK: Tensor, p_NK: Tensor, scale: float) -> Tensor:
        """-sum_k p_k log q(id_k) over K ids of each position, whose p sum to one."""
        if student.wants_gradient:
            student.add_softmax(self.temperature, scale)
            student.add_at(ids_NK, p_NK * -scale)
        return -(p_NK * student.log_q(self.temperature).gather(-1, ids_NK)).sum(dim=-1)

    def _full(self, student: StudentChunk, log_p_NV: Tensor, scale: float) -> Tensor:
        """sum_i p_i (log p_i - log q_i) over the vocabulary; `log_p_NV` is overwritten."""
        p_NV = log_p_NV.exp()
        value_N = log_p_NV.sub_(student.log_q(self.temperature)).mul_(p_NV).sum(dim=-1)
        if student.wants_gradient:
            student.add_softmax(self.temperature, scale)
            student.add(p_NV.mul_(-scale))
        return value_N

    def _bucket(
        self, student: StudentChunk, ids_NK: Tensor, log_p_NK: Tensor, log_p_tail_N: Tensor, scale: float
    ) -> Tensor:
        """Head entries one by one, all other ids as one bucket; entries of log-probability -inf are not there.

        The gradient in u is q - p on the head and q (1 - p_tail / q_tail) outside: a multiple of q per position, put
        right on the head.
        """
        log_q_NV = student.log_q(self.temperature)
        is_there_NK = torch.isfinite(log_p_NK)
        log_q_NK = log_q_NV.gather(-1, ids_NK)
        log_q_tail_N = _log_mass_outside(log_q_NV, ids_NK, torch.where(is_there_NK, log_q_NK.exp(), 0.0).sum(dim=-1))
        p_NK, p_tail_N = log_p_NK.exp(), log_p_tail_N.exp()
        head_N = torch.where(is_there_NK, p_NK * (log_p_NK - log_q_NK), 0.0).sum(dim=-1)
        tail_N = torch.where(p_tail_N > 0, p_tail_N * (log_p_tail_N - log_q_tail_N), 0.0)
        if student.wants_gradient:
            share_N1 = 1 - (log_p_tail_N - log_q_tail_N).exp()[:, None]
            student.add_softmax(self.temperature, share_N1 * scale)
            q_NK = torch.where(is_there_NK, log_q_NK.exp(), 0.0)
            student.add_at(ids_NK, (q_NK * (1 - share_N1) - p_NK) * scale)
        return head_N + tail_N


def _log_mass_outside(log_q_NV: Tensor, ids_NK: Tensor, mass_inside_N: Tensor) -> Tensor:
    """log of the sum of q over all ids not in `ids_NK`, (N,); a small one is summed over those ids themselves."""
    outside_N = torch.log1p(-mass_inside_N.clamp(max=_LARGEST_HEAD_MASS))
    is_small_N = mass_inside_N > _LARGEST_HEAD_MASS
    if is_small_N.any():
        tail_NV = log_q_NV[is_small_N].scatter_(-1, ids_NK[is_small_N], -torch.inf)
        outside_N[is_small_N] = tail_NV.logsumexp(dim=-1)
    return outside_N
