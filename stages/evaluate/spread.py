"""Standard errors of held-out means: positions of one document are alike, so documents are what varies.

Where there are few of them it is windows.

Shapes: N positions, C documents or windows.
"""

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tristill.cache.spec import SplitName
from tristill.stages.collectives import summed
from tristill.stages.ranks import Ranks
from tristill.stages.targets.source import Epoch, Signals, TargetSource

Unit = Literal["document", "window"]
_FEW_DOCUMENTS, _WINDOWS_READ = 10, 64


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

    def __init__(self, unit: Unit, num_units: int) -> None:
        """`num_units`: that there can be; those without any position are not counted."""
        self.unit: Unit = unit
        self._sums_4C = torch.zeros(4, num_units, dtype=torch.float64)

    def add(self, units_N: Tensor, loss_N: Tensor, kl_N: Tensor | None, agreement_N: Tensor | None) -> None:
        """Count positions; `units_N` says of which document or window each is."""
        nothing_N = torch.zeros_like(loss_N)
        values = [torch.ones_like(loss_N), loss_N, *(nothing_N if one is None else one for one in (kl_N, agreement_N))]
        self._sums_4C.index_add_(1, units_N.cpu(), torch.stack([value.double() for value in values]).cpu())

    def errors(self, ranks: Ranks, *, has_kl: bool, has_agreement: bool) -> StandardErrors | None:
        """Of the means over the units of all ranks; None for too few units."""
        sums_4C = summed(self._sums_4C, ranks)
        count_C, sums_3C = sums_4C[0], sums_4C[1:]
        num_units = int((count_C > 0).sum())
        if num_units < (_FEW_DOCUMENTS if self.unit == "document" else 2):
            return None
        means_3 = sums_3C.sum(dim=1) / count_C.sum()
        squares_3 = (sums_3C - means_3[:, None] * count_C).square().sum(dim=1)
        errors_3 = (squares_3 * num_units / (num_units - 1)).sqrt() / count_C.sum()
        loss, kl, agreement = (value if math.isfinite(value) else None for value in errors_3.tolist())
        return StandardErrors(
            unit=self.unit,
            num_units=num_units,
            loss_nats=loss,
            kl_to_teacher_nats=kl if has_kl else None,
            top1_agreement=agreement if has_agreement else None,
        )


class Documents:
    """Numbers the documents of held-out windows, which stand in the order of the text, each with a token at its end."""

    def __init__(self, source: TargetSource, split: SplitName) -> None:
        """Reads the ids of all windows, and nothing of the teacher."""
        self._end_of_text_id = source.end_of_text_id
        ends = [torch.zeros(1, dtype=torch.int64)]
        for batch in source.batches(split, _WINDOWS_READ, Signals(), Epoch()):
            inside_B = (batch.input_ids_BT == self._end_of_text_id).sum(dim=1)
            ends.append((inside_B + (batch.labels_BT[:, -1] == self._end_of_text_id)).cpu())
        self._before_W1 = torch.cat(ends).cumsum(dim=0)
        self.num_windows, self.most = len(self._before_W1) - 1, int(self._before_W1[-1]) + 1

    def of(self, first_window: int, input_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each label's document and of its window, (B, T); numbers of documents may have gaps."""
        windows_B = torch.arange(first_window, first_window + len(input_ids_BT))
        ends_BT = (input_ids_BT == self._end_of_text_id).cumsum(dim=1)
        before_B1, windows_B1 = (found.to(ends_BT.device)[:, None] for found in (self._before_W1[windows_B], windows_B))
        return before_B1 + ends_BT, windows_B1.expand_as(ends_BT)
