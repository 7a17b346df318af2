"""From logits to adaptive heads, their tails, and the two signals (docs/format.md, section 4).

Shapes: N positions, V vocabulary, K largest number of entries, M temperatures.
"""

import torch
from torch import Tensor

from cache.parts import SIGNAL_STEP_NATS
from cache.profiles.heads import HeadSize
from stages.dump.select import largest


def signals(logits_NV: Tensor, labels_N: Tensor, temperature: float) -> dict[str, Tensor]:
    """`teacher_entropy` and `label_log_prob` of p at `temperature`, in steps of 1/8 nat, (N,) uint8."""
    log_p_NV = torch.log_softmax(logits_NV / temperature if temperature != 1 else logits_NV, dim=-1)
    label_N = -log_p_NV.gather(-1, labels_N[:, None])[:, 0]
    p_NV = log_p_NV.exp()
    entropy_N = -(log_p_NV.mul_(p_NV)).sum(dim=-1)
    return {
        "teacher_entropy": (entropy_N / SIGNAL_STEP_NATS).round().clamp(0, 255).to(torch.uint8),
        "label_log_prob": (label_N / SIGNAL_STEP_NATS).round().clamp(0, 255).to(torch.uint8),
    }


def adaptive_head(
    logits_NV: Tensor, size: HeadSize, temperatures: tuple[float, ...], with_tail: bool
) -> dict[str, Tensor]:
    """The entries with p >= size.probability at the first temperature, and the log-mass of all others; in float32.

    head_count (N,), head_ids (N, K) int64 largest first, head_logits (N, K) (z - max z) / temperatures[0],
    tail_logsumexp (N, M) log of the sum over all ids outside the head of exp((z - max z) / tau_m).
    """
    values_NK, ids_NK = largest(logits_NV, size.max_entries)
    top_N1 = values_NK[:, :1]
    relative_NV = logits_NV - top_N1
    scaled_NK = (values_NK - top_N1) / temperatures[0]
    weights_NV = torch.exp(relative_NV if temperatures[0] == 1 else relative_NV / temperatures[0])
    threshold_N1 = size.probability * weights_NV.sum(dim=-1, keepdim=True)
    count_N = (scaled_NK.exp() >= threshold_N1).sum(dim=-1).clamp(size.min_entries, size.max_entries)
    is_kept_NK = torch.arange(size.max_entries, device=ids_NK.device) < count_N[:, None]
    ids_NK = torch.where(is_kept_NK, ids_NK, ids_NK[:, :1])
    head = {
        "head_count": count_N,
        "head_ids": ids_NK,
        "head_logits": torch.where(is_kept_NK, scaled_NK, 0),
    }
    if not with_tail:
        return head
    masses = []
    for temperature in temperatures:
        if temperature != temperatures[0]:
            torch.div(relative_NV, temperature, out=weights_NV).exp_()
        masses.append(weights_NV.scatter_(-1, ids_NK, 0).sum(dim=-1).log())
    return {**head, "tail_logsumexp": torch.stack(masses, dim=1)}
