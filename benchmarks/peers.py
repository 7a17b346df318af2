"""What other systems keep of a teacher's distribution, rebuilt on the same logits, with the bytes that they take raw.

Shapes: N positions, V vocabulary, K entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tristill.stages.losses.target import LogitsTarget


@dataclass(frozen=True)
class Probabilities:
    """Targets from weights over the vocabulary at temperature 1: p_tau is proportional to weights^(1/tau)."""

    log_weights_of: Callable[[slice], Tensor]

    def chunk(self, rows: slice, dtype: torch.dtype = torch.float32) -> LogitsTarget:  # noqa: ARG002
        """Ids without weight have the smallest logit there is."""
        return LogitsTarget(self.log_weights_of(rows).clamp_(min=-1e30))


@dataclass(frozen=True)
class Peer:
    """A codec of the field."""

    name: str
    bytes_per_position: float
    targets: Probabilities


def random_sampling(logits_NV: Tensor, num_draws: int) -> Peer:
    """Random Sampling KD (arXiv 2503.16870): draws with replacement, 17 bits of id and 7 of count per unique id."""
    generator = torch.Generator().manual_seed(num_draws)
    ids_NK = torch.multinomial(torch.softmax(logits_NV, dim=-1), num_draws, replacement=True, generator=generator)
    unique = sum(len(row) for row in (torch.unique(ids) for ids in ids_NK)) / len(ids_NK)

    def log_weights(rows: slice) -> Tensor:
        counts_NV = torch.zeros(len(logits_NV[rows]), logits_NV.shape[1])
        return counts_NV.scatter_add_(1, ids_NK[rows], torch.ones(ids_NK[rows].shape)).log_()

    return Peer(f"random sampling, {num_draws} draws", 3 * unique, Probabilities(log_weights))


def renormalised(logits_NV: Tensor, top_k: int) -> Peer:
    """Top-k in float16 with ids of whole bits, the rest taken for nothing: the common cache."""
    values_NK, ids_NK = logits_NV.topk(top_k)
    id_bits = math.ceil(math.log2(logits_NV.shape[1]))

    def log_weights(rows: slice) -> Tensor:
        empty_NV = torch.full((len(logits_NV[rows]), logits_NV.shape[1]), -math.inf)
        return empty_NV.scatter_(1, ids_NK[rows], values_NK[rows].half().float())

    return Peer(f"top-{top_k}, renormalised", top_k * (id_bits / 8 + 2), Probabilities(log_weights))


def polynomial(logits_NV: Tensor, top_k: int, exact: int = 8, degree: int = 4) -> Peer:
    """DistillKit's way: `exact` logits in float16, the others a polynomial of their rank; the rest nothing."""
    values_NK, ids_NK = logits_NV.topk(top_k)
    ranks_R = torch.linspace(0, 1, top_k - exact, dtype=torch.float64)
    design = torch.stack([ranks_R**power for power in range(degree + 1)], dim=1)
    rest = values_NK[:, exact:].double()
    coefficients = torch.linalg.lstsq(design, rest.T).solution.T.half().double()
    fitted_NK = torch.cat([values_NK[:, :exact].half().float(), (coefficients @ design.T).float()], dim=1)
    id_bits = math.ceil(math.log2(logits_NV.shape[1]))

    def log_weights(rows: slice) -> Tensor:
        empty_NV = torch.full((len(logits_NV[rows]), logits_NV.shape[1]), -math.inf)
        return empty_NV.scatter_(1, ids_NK[rows], fitted_NK[rows])

    num_bytes = top_k * id_bits / 8 + 2 * exact + 2 * (degree + 1)
    return Peer(f"top-{top_k}, polynomial", num_bytes, Probabilities(log_weights))
