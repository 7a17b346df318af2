"""Mean squared error between logits.

Shapes: N positions, C cells.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tristill.stages.losses.cells import Cells
from tristill.stages.losses.divergence import Divergence


@dataclass(frozen=True)
class LogitMSE(Divergence):
    """(1/C) sum_i (d_i - mean d)^2, d = z_teacher - z_student: logits are compared up to a constant, in nats squared.

    Kim et al. 2021 (arXiv 2105.08919), equation 4; centred, since softmax does not see a constant, and since a cache
    does not know it. The limit of 2 tau^2 KL at high tau (Hinton et al. 2015, equation 4). On a head it is the mean
    over its entries, and blind to the tail. `temperature` is the one that the target is read at; the value
    does not depend on it.
    """

    name: ClassVar[str] = "logit_mse"

    def compare(self, cells: Cells, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """See Divergence; the slopes sum to zero."""
        del labels_N
        difference_NC = (cells.log_p_NC - cells.log_q_NC).mul_(self.temperature)
        if cells.is_entry_NC is None:
            count_N1: Tensor | int = difference_NC.shape[1]
            difference_NC -= difference_NC.mean(dim=-1, keepdim=True)
        else:
            count_N1 = cells.is_entry_NC.sum(dim=-1, keepdim=True)
            difference_NC = torch.where(cells.is_entry_NC, difference_NC, 0.0)
            centred_NC = difference_NC - difference_NC.sum(dim=-1, keepdim=True) / count_N1
            difference_NC = torch.where(cells.is_entry_NC, centred_NC, 0.0)
        value_N1 = difference_NC.square().sum(dim=-1, keepdim=True) / count_N1
        return value_N1[:, 0], difference_NC * (-2 * self.temperature / count_N1)
