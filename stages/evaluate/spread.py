"""Standard errors of held-out means: positions of one document are alike, so documents are what varies.

Where there are few of them, or many ranks share their windows, it is windows.

Shapes: N positions, C documents or windows.
"""

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from stages.collectives import sum_of, summed
from stages.ranks import Ranks

Unit = Literal["document", "window"]
_FEW_DOCUMENTS = 10


class StandardErrors(BaseModel):
    """Standard errors of means over positions, for a sample of `num_units` documents or windows.

    Of a ratio of sums over units (Cochran 1977, Sampling Techniques, section 2.11): with unit c's sum s_c over its n_c
    positions and the mean m, sqrt(C / (C - 1) * sum_c (s_c - m n_c)^2) / sum_c n_c. None where the mean is, or is
    infinite.
    """

    model_config = ConfigDict(frozen=True)

    unit: Unit
    num_units: int
    loss_nats: float | None
    kl_to_teacher_nats: float | None
    top1_agreement: float | None


class UnitSums:
    """Positions, loss, KL and agreement summed by unit, in float64."""

    def __init__(self, unit: Unit) -> None:
        self.unit: Unit = unit
        self._sums_4C = torch.zeros(4, 1, dtype=torch.float64)

    def add(self, units_N: Tensor, loss_N: Tensor, kl_N: Tensor | None, agreement_N: Tensor | None) -> None:
        """Count positions; `units_N` says of which document or window each is."""
        if not len(units_N):
            return
        units_N = units_N.cpu()
        if (missing := int(units_N.max()) + 1 - self._sums_4C.shape[1]) > 0:
            room = self._sums_4C.new_zeros(4, max(missing, self._sums_4C.shape[1]))
            self._sums_4C = torch.cat([self._sums_4C, room], dim=1)
        nothing_N = torch.zeros_like(loss_N)
        values = [torch.ones_like(loss_N), loss_N, *(nothing_N if one is None else one for one in (kl_N, agreement_N))]
        self._sums_4C.index_add_(1, units_N, torch.stack([value.double() for value in values]).cpu())

    def errors(self, ranks: Ranks, *, has_kl: bool, has_agreement: bool) -> StandardErrors | None:
        """Of the means over the units of all ranks; None for too few units."""
        count_C, sums_3C = self._sums_4C[0], self._sums_4C[1:]
        totals = summed(self._sums_4C.sum(dim=1), ranks)
        num_units = round(sum_of(int((count_C > 0).sum()), ranks))
        if num_units < (_FEW_DOCUMENTS if self.unit == "document" else 2):
            return None
        means_3 = totals[1:] / totals[0]
        squares_3 = summed((sums_3C - means_3[:, None] * count_C).square().sum(dim=1), ranks)
        errors = (squares_3 * num_units / (num_units - 1)).sqrt() / totals[0]
        loss, kl, agreement = (value if math.isfinite(value) else None for value in errors.tolist())
        return StandardErrors(
            unit=self.unit,
            num_units=num_units,
            loss_nats=loss,
            kl_to_teacher_nats=kl if has_kl else None,
            top1_agreement=agreement if has_agreement else None,
        )


class Documents:
    """Numbers the documents of windows that come in their order, which end with a token of end of text."""

    def __init__(self, end_of_text_id: int) -> None:
        self._end_of_text_id = end_of_text_id
        self._next = 0

    def of(self, input_ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """The number of each label's document, (B, T); there may be gaps between numbers."""
        ends_BT = (input_ids_BT == self._end_of_text_id).long()
        last_B = (labels_BT[:, -1] == self._end_of_text_id).long()
        in_window_B = ends_BT.sum(dim=1) + last_B
        before_B = self._next + in_window_B.cumsum(dim=0) - in_window_B
        self._next += int(in_window_B.sum())
        return before_B[:, None] + ends_BT.cumsum(dim=1)
