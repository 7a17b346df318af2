"""Forward KL divergence from teacher to student on a head of single entries and one bucket for the tail.

Shapes: N positions, K head entries, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.losses.target import HeadTarget


@dataclass(frozen=True)
class ForwardKL:
    """KL(p_tau || q_tau) = sum_i p_i log(p_i / q_i), in nats, p the teacher's, q the student's, both at tau.

    Hinton et al. 2015 (arXiv 1503.02531); their factor tau^2 is the caller's weight. With a tail the sum runs over the
    K head entries and one bucket, p_tail = 1 - sum of p_i and q_tail likewise: by the log sum inequality a lower bound
    of the full divergence, zero if and only if head and tail mass agree; nothing is taught about the tail's shape.
    With the whole vocabulary as the head it is the full divergence.
    """

    temperature: float
    name: str = "forward_kl"
    needs_teacher: bool = True

    def per_position(self, logits_NV: Tensor, labels_N: Tensor, target: HeadTarget | None) -> Tensor:  # noqa: ARG002
        """(N,) float32."""
        assert target is not None
        head_log_probs_NK, tail_log_prob_N = target.log_probs(self.temperature)
        scaled_NV = logits_NV if self.temperature == 1 else logits_NV / self.temperature
        if target.head_ids_NK is None:
            divergence: Tensor = _FullKL.apply(scaled_NV, head_log_probs_NK)  # type: ignore[no-untyped-call]
        elif tail_log_prob_N is None:
            head_NK = scaled_NV.gather(-1, target.head_ids_NK)
            divergence = _FullKL.apply(head_NK, head_log_probs_NK)  # type: ignore[no-untyped-call]
        else:
            divergence = _BucketKL.apply(  # type: ignore[no-untyped-call]
                scaled_NV, target.head_ids_NK, head_log_probs_NK, tail_log_prob_N
            )
        return divergence


class _FullKL(torch.autograd.Function):
    """sum_i p_i (log p_i - log q_i) with log q = log_softmax(u); the gradient in u is q - p."""

    @staticmethod
    def forward(ctx: Any, u_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        log_q_NV = torch.log_softmax(u_NV, dim=-1)
        p_NV = log_p_NV.exp()
        ctx.save_for_backward(log_q_NV, p_NV)
        return (p_NV * (log_p_NV - log_q_NV)).sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        log_q_NV, p_NV = ctx.saved_tensors
        return (log_q_NV.exp() - p_NV).mul_(gradients[0][:, None]), None


class _BucketKL(torch.autograd.Function):
    """Head entries one by one, all other ids as one bucket.

    With Z_tail = logsumexp of u outside the head, Z = logaddexp(logsumexp(u_head), Z_tail) and s = softmax of u
    outside the head (zero inside), the gradient in u is q - p on the head and s * (q_tail - p_tail) outside: one
    softmax over the vocabulary, and exact however small the tail is.
    """

    @staticmethod
    def forward(ctx: Any, u_NV: Tensor, ids_NK: Tensor, log_p_NK: Tensor, log_p_tail_N: Tensor) -> Tensor:
        u_head_NK = u_NV.gather(-1, ids_NK)
        u_tail_NV = u_NV.scatter(-1, ids_NK, -torch.inf)
        log_z_tail_N = u_tail_NV.logsumexp(dim=-1)
        log_z_N = torch.logaddexp(u_head_NK.logsumexp(dim=-1), log_z_tail_N)
        log_q_NK = u_head_NK - log_z_N[:, None]
        log_q_tail_N = log_z_tail_N - log_z_N
        p_NK, p_tail_N = log_p_NK.exp(), log_p_tail_N.exp()
        head_N = (p_NK * (log_p_NK - log_q_NK)).sum(dim=-1)
        tail_N = torch.where(p_tail_N > 0, p_tail_N * (log_p_tail_N - log_q_tail_N), 0.0)
        s_NV = u_tail_NV.sub_(log_z_tail_N[:, None]).exp_()
        ctx.save_for_backward(s_NV, ids_NK, log_q_NK.exp() - p_NK, log_q_tail_N.exp() - p_tail_N)
        return head_N + tail_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        s_NV, ids_NK, head_NK, tail_N = ctx.saved_tensors
        gradient_NV = s_NV * (tail_N * gradients[0])[:, None]
        gradient_NV.scatter_(-1, ids_NK, head_NK * gradients[0][:, None])
        return gradient_NV, None, None, None
