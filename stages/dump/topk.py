"""From logits to what profile `topk` stores (docs/format.md, section 4).

Shapes: N positions, V vocabulary, K head entries.
"""

import torch
from torch import Tensor

from tristill.stages.dump.select import largest


def topk_target(logits_NV: Tensor, top_k: int, temperature: float) -> dict[str, Tensor]:
    """Head and tail of softmax(logits / temperature); computed in float32, and `logits_NV` is overwritten.

    head_ids (N, K) int64, largest first. head_logits (N, K) float32, (z - max z) / temperature. tail_logsumexp (N,)
    float32, log of the sum of exp((z - max z) / temperature) over all ids outside the head, -inf if there are none.
    """
    vocab_size = logits_NV.shape[1]
    values_NJ, ids_NJ = largest(logits_NV, min(top_k + 1, vocab_size))
    relative_NJ = (values_NJ - values_NJ[:, :1]) / temperature
    head = {"head_ids": ids_NJ[:, :top_k], "head_logits": relative_NJ[:, :top_k]}
    if top_k == vocab_size:
        return {**head, "tail_logsumexp": torch.full_like(relative_NJ[:, 0], -torch.inf)}
    # Of the largest entry t outside the head, log_softmax over the tail is u_t - logsumexp(u_tail): one fused pass.
    tail_NV = logits_NV.scatter_(-1, ids_NJ[:, :top_k], -torch.inf)
    scaled_NV = tail_NV if temperature == 1 else tail_NV.div_(temperature)
    log_share_N = torch.log_softmax(scaled_NV, dim=-1).gather(-1, ids_NJ[:, top_k:])[:, 0]
    return {**head, "tail_logsumexp": relative_NJ[:, top_k] - log_share_N}
