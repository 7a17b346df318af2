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
            student.add(p_NV, -scale)
        return value_N

    def _bucket(
        self, student: StudentChunk, ids_NK: Tensor, log_p_NK: Tensor, log_p_tail_N: Tensor, scale: float
    ) -> Tensor:
        """Head entries one by one, all other ids as one bucket; entries of log-probability -inf are not there.

        The gradient in u is q - p on the head and q (1 - p_tail / q_tail) outside: a multiple of q per position, put
        right on the head, unless the student's tail is small.
        """
        log_q_NV = student.log_q(self.temperature)
        is_there_NK = torch.isfinite(log_p_NK)
        log_q_NK = log_q_NV.gather(-1, ids_NK)
        q_NK = torch.where(is_there_NK, log_q_NK.exp(), 0.0)
        is_small_N = q_NK.sum(dim=-1) > _LARGEST_HEAD_MASS
        log_q_tail_N = _log_mass_outside(log_q_NV, ids_NK, q_NK, is_small_N)
        p_NK, p_tail_N = log_p_NK.exp(), log_p_tail_N.exp()
        head_N = torch.where(is_there_NK, p_NK * (log_p_NK - log_q_NK), 0.0).sum(dim=-1)
        tail_N = torch.where(p_tail_N > 0, p_tail_N * (log_p_tail_N - log_q_tail_N), 0.0)
        if student.wants_gradient:
            log_ratio_N = torch.where(p_tail_N > 0, log_p_tail_N - log_q_tail_N, -torch.inf)
            share_N1 = torch.where(is_small_N, 0.0, 1 - log_ratio_N.exp())[:, None]
            student.add_softmax(self.temperature, share_N1 * scale)
            head_NK = torch.where(is_small_N[:, None], 0.0, q_NK * (1 - share_N1) - p_NK)
            student.add_at(ids_NK, head_NK * scale)
            if is_small_N.any():
                self._add_small_tails(student, ids_NK, q_NK - p_NK, is_there_NK, log_ratio_N, is_small_N, scale)
        return head_N + tail_N

    def _add_small_tails(
        self,
        student: StudentChunk,
        ids_NK: Tensor,
        head_NK: Tensor,
        is_there_NK: Tensor,
        log_ratio_N: Tensor,
        is_small_N: Tensor,
        scale: float,
    ) -> None:
        """The gradient where the student's tail is small: a multiple of q put right on the head would cancel digits.

        `head_NK` is q - p; log_ratio_N is log(p_tail / q_tail).
        """
        log_q_NV = student.log_q(self.temperature)
        tail_NV = log_q_NV[is_small_N].exp()
        tail_NV -= (log_q_NV[is_small_N] + log_ratio_N[is_small_N, None]).exp()
        # Entries that are not there repeat the first one's id: they must write the first one's value.
        there_NK = torch.where(is_there_NK, head_NK, head_NK[:, :1])[is_small_N]
        tail_NV.scatter_(-1, ids_NK[is_small_N], there_NK)
        gradient_NV = torch.zeros_like(log_q_NV)
        gradient_NV[is_small_N] = tail_NV
        student.add(gradient_NV, scale)


def _log_mass_outside(log_q_NV: Tensor, ids_NK: Tensor, q_NK: Tensor, is_small_N: Tensor) -> Tensor:
    """log of the sum of q over all ids not in `ids_NK`, (N,); a small one is summed over those ids themselves."""
    outside_N = torch.log1p(-q_NK.sum(dim=-1).clamp(max=_LARGEST_HEAD_MASS))
    if is_small_N.any():
        tail_NV = log_q_NV[is_small_N].scatter_(-1, ids_NK[is_small_N], -torch.inf)
        outside_N[is_small_N] = tail_NV.logsumexp(dim=-1)
    return outside_N
