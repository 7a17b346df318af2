"""From the teacher's distribution to adaptive heads, their tails, and two signals (docs/format.md, sections 3 and 4).

Shapes: N positions, V vocabulary, K largest number of entries, M temperatures.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tristill.cache.parts import SIGNAL_STEP_NATS
from tristill.cache.profiles.heads import HeadSize
from tristill.stages.dump.select import largest
from tristill.stages.models.language_model import require_finite

_LOWEST_SAFE_LOG_P = -80.0
"""Below some -87 nats a float32 probability loses digits, and its square root with it."""


@dataclass(frozen=True)
class Distribution:
    """p at the temperature of the dump, over the whole vocabulary: computed once, for all that is stored of it."""

    log_p_NV: Tensor
    p_NV: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, temperature: float) -> "Distribution":
        """softmax(logits / temperature)."""
        log_p_NV = torch.log_softmax(logits_NV if temperature == 1 else logits_NV / temperature, dim=-1)
        return cls(log_p_NV, log_p_NV.exp())


def signals(distribution: Distribution, labels_N: Tensor) -> dict[str, Tensor]:
    """`teacher_entropy` and `label_log_prob`, in steps of 1/8 nat, (N,) uint8."""
    label_N = -distribution.log_p_NV.gather(-1, labels_N[:, None])[:, 0]
    entropy_N = -(distribution.log_p_NV * distribution.p_NV).sum(dim=-1)
    require_finite(entropy_N.dtype, entropy_N, "the teacher's logits")
    return {
        "teacher_entropy": (entropy_N / SIGNAL_STEP_NATS).round().clamp(0, 255).to(torch.uint8),
        "label_log_prob": (label_N / SIGNAL_STEP_NATS).round().clamp(0, 255).to(torch.uint8),
    }


def adaptive_head(
    distribution: Distribution, size: HeadSize, temperatures: tuple[float, ...], *, with_tail: bool
) -> dict[str, Tensor]:
    """The entries with p >= size.probability at temperatures[0], and the log-mass of all others; `p_NV` is overwritten.

    head_count (N,), head_ids (N, K) int64 largest first, head_logits (N, K) (z - max z) / temperatures[0],
    tail_logsumexp (N, M) log of the sum over all ids outside the head of exp((z - max z) / tau_m).
    """
    log_p_NV, p_NV = distribution.log_p_NV, distribution.p_NV
    values_NK, ids_NK = largest(log_p_NV, size.max_entries)
    top_N1 = values_NK[:, :1]
    count_N = (values_NK.exp() >= size.probability).sum(dim=-1).clamp(size.min_entries, size.max_entries)
    is_kept_NK = torch.arange(size.max_entries, device=ids_NK.device) < count_N[:, None]
    ids_NK = torch.where(is_kept_NK, ids_NK, ids_NK[:, :1])
    head = {
        "head_count": count_N,
        "head_ids": ids_NK,
        "head_logits": torch.where(is_kept_NK, values_NK - top_N1, 0),
    }
    if not with_tail:
        return head
    log_masses = []
    before = 2.0
    underflows = float(log_p_NV.min()) < _LOWEST_SAFE_LOG_P
    for temperature in temperatures:
        power = temperatures[0] / temperature
        if power == 1:
            p_NV.scatter_(-1, ids_NK, 0)
        elif power == before / 2 and not underflows:  # far cheaper than an exponential, and the head is zero already
            p_NV.sqrt_()
        else:
            torch.mul(log_p_NV, power, out=p_NV).exp_().scatter_(-1, ids_NK, 0)
        before = power
        log_masses.append(p_NV.sum(dim=-1).log() - power * top_N1[:, 0])
    return {**head, "tail_logsumexp": torch.stack(log_masses, dim=1)}
