"""From logits to what profile `topk` stores (docs/format.md, section 4).

Shapes: N positions, V vocabulary, K head entries.
"""

import torch
from torch import Tensor


def topk_target(logits_NV: Tensor, top_k: int, temperature: float) -> dict[str, Tensor]:
    """Head and tail of softmax(logits / temperature); computed in float32, and `logits_NV` is overwritten.

    head_ids (N, K) int64, largest first. head_logits (N, K) float32, (z - max z) / temperature. tail_logsumexp (N,)
    float32, log of the sum of exp((z - max z) / temperature) over all ids outside the head, -inf if there are none or
    if they all underflow.
    """
    values_NK, ids_NK = logits_NV.topk(top_k, dim=-1)
    largest_N1 = values_NK[:, :1].clone()
    tail_NV = logits_NV.scatter_(-1, ids_NK, -torch.inf)
    tail_N = tail_NV.sub_(largest_N1).div_(temperature).exp_().sum(dim=-1).log_()
    return {
        "head_ids": ids_NK,
        "head_logits": values_NK.sub_(largest_N1).div_(temperature),
        "tail_logsumexp": tail_N,
    }
