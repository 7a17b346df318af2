"""Reverse KL divergence, and its mixture with the forward one.

Shapes: N positions, C cells.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tristill.stages.losses.cells import LOWEST_LOG_PROB, Cells
from tristill.stages.losses.divergence import Divergence


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q_tau || p_tau) = sum_i q_i log(q_i / p_i), in nats: it seeks a mode of the teacher's, and leaves others out.

    Gu et al. 2024, MiniLLM (arXiv 2306.08543), here per position on the windows of the corpus. On a head with a bucket
    it is a lower bound, as forward KL is. The gradient in the logits is q_i (log(q_i / p_i) - KL) / tau.
    """

    name: ClassVar[str] = "reverse_kl"

    def compare(self, cells: Cells, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """See Divergence; the slope is q log(q / p), up to a multiple of q."""
        del labels_N
        slope_NC = cells.log_q_NC.exp().mul_(cells.log_q_NC - cells.log_p_NC)
        return slope_NC.sum(dim=-1), slope_NC


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """w KL(p || q) + (1 - w) KL(q || p), w = the share of sum_i |p_i - q_i| that lies in the teacher's head.

    Wu et al. 2024, Rethinking KL Divergence in Knowledge Distillation for LLMs (arXiv 2404.02657), section 4: the head
    is the fewest ids of at least `head_mass`; w is a constant to the gradient. A bucket counts with the tail.
    """

    head_mass: float = 0.5
    name: ClassVar[str] = "adaptive_kl"

    def compare(self, cells: Cells, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """See Divergence."""
        del labels_N
        log_p_NC, log_q_NC = cells.log_p_NC, cells.log_q_NC
        p_NC, q_NC = log_p_NC.exp(), log_q_NC.exp()
        order_NC = torch.sort(_entries_first(cells), dim=-1, descending=True).indices
        sorted_NC = p_NC.gather(-1, order_NC)
        is_before_NC = sorted_NC.cumsum(dim=-1) - sorted_NC < self.head_mass
        is_head_NC = torch.empty_like(is_before_NC).scatter_(-1, order_NC, is_before_NC)
        if cells.is_entry_NC is not None:
            is_head_NC &= cells.is_entry_NC
        gap_NC = (p_NC - q_NC).abs()
        head_N = torch.where(is_head_NC, gap_NC, 0.0).sum(dim=-1)
        all_N = gap_NC.sum(dim=-1)
        share_N1 = torch.where(all_N > 0, head_N / all_N, 0.5)[:, None]
        log_ratio_NC = log_p_NC - log_q_NC
        reverse_NC = q_NC * -log_ratio_NC
        value_N = (share_N1 * p_NC * log_ratio_NC + (1 - share_N1) * reverse_NC).sum(dim=-1)
        return value_N, (1 - share_N1) * reverse_NC - share_N1 * p_NC


def _entries_first(cells: Cells) -> Tensor:
    """log p of single ids; the lowest where a cell is none."""
    if cells.is_entry_NC is None:
        return cells.log_p_NC
    return torch.where(cells.is_entry_NC, cells.log_p_NC, LOWEST_LOG_PROB)
