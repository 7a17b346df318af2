"""Decoupled knowledge distillation: the target class, and the others among themselves.

Shapes: N positions, C cells.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tristill.stages.losses.cells import LOWEST_LOG_PROB, Cells
from tristill.stages.losses.divergence import Divergence


@dataclass(frozen=True)
class DecoupledKD(Divergence):
    """alpha KL(b_p || b_q) + beta KL(p' || q'): b = (p_t, 1 - p_t), p' = p without t, renormalised.

    Zhao et al. 2022, Decoupled Knowledge Distillation (arXiv 2203.08679), equation 7; forward KL is alpha = 1 and beta
    = 1 - p_t. t is the label, as there, or the teacher's most likely id. A bucket is one of the others.
    """

    alpha: float = 1.0
    beta: float = 1.0
    of: Literal["label", "top1"] = "label"
    name: ClassVar[str] = "decoupled_kd"

    def compare(self, cells: Cells, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """See Divergence; all in log space, so that a target of probability one loses no digits."""
        log_p_NC, log_q_NC = cells.log_p_NC, cells.log_q_NC
        place_N1 = self._place(cells, labels_N)
        log_p_N1, log_q_N1 = log_p_NC.gather(-1, place_N1), log_q_NC.gather(-1, place_N1)
        other_p_NC = log_p_NC.scatter(-1, place_N1, LOWEST_LOG_PROB)
        other_q_NC = log_q_NC.scatter(-1, place_N1, LOWEST_LOG_PROB)
        log_rest_p_N1 = other_p_NC.logsumexp(dim=-1, keepdim=True)
        log_rest_q_N1 = other_q_NC.logsumexp(dim=-1, keepdim=True)
        p_N1, rest_p_N1 = log_p_N1.exp(), log_rest_p_N1.exp()
        target_N1 = p_N1 * (log_p_N1 - log_q_N1) + rest_p_N1 * (log_rest_p_N1 - log_rest_q_N1)
        other_p_NC, other_q_NC = other_p_NC - log_rest_p_N1, other_q_NC - log_rest_q_N1
        share_p_NC, share_q_NC = other_p_NC.exp(), other_q_NC.exp()
        # Where the target has all the mass, as in a renormalised head of one entry, the others have no shares.
        beta_N1 = torch.where(log_rest_p_N1 > LOWEST_LOG_PROB / 2, self.beta, 0.0)
        others_N = (share_p_NC * (other_p_NC - other_q_NC)).sum(dim=-1)
        slope_NC = (beta_N1 - self.alpha * rest_p_N1) * share_q_NC - beta_N1 * share_p_NC
        slope_NC.scatter_(-1, place_N1, -self.alpha * p_N1)
        return self.alpha * target_N1[:, 0] + beta_N1[:, 0] * others_N, slope_NC

    def _place(self, cells: Cells, labels_N: Tensor) -> Tensor:
        """The cell of the target class, (N, 1)."""
        if self.of == "label":
            assert cells.ids_NK is None, "a head does not know the probability of every label; it was refused"
            return labels_N[:, None]
        log_p_NC = cells.log_p_NC
        if cells.is_entry_NC is not None:
            log_p_NC = torch.where(cells.is_entry_NC, log_p_NC, LOWEST_LOG_PROB)
        return log_p_NC.argmax(dim=-1, keepdim=True)
