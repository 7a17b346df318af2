"""Total variation distance.

Shapes: N positions, C cells.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tristill.stages.losses.cells import Cells
from tristill.stages.losses.divergence import Divergence


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """(1/2) sum_i |p_i - q_i|, between 0 and 1.

    Wen et al. 2023, f-Divergence Minimization (arXiv 2307.15190), section 3.2. One minus it is the acceptance rate of
    speculative decoding. On a head with a bucket a lower bound. At p = q, where it has a corner, the gradient is zero.
    """

    name: ClassVar[str] = "total_variation"

    def compare(self, cells: Cells, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """See Divergence; the slope is q sign(q - p) / 2."""
        del labels_N
        q_NC = cells.log_q_NC.exp()
        difference_NC = q_NC - cells.log_p_NC.exp()
        return difference_NC.abs().sum(dim=-1) / 2, difference_NC.sign_().mul_(q_NC).div_(2)
