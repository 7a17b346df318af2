"""Teacher and student as distributions over the same cells, at one temperature: what every divergence compares.

Of a whole target the cells are the V ids; of a head they are its K entries and, where ids lie outside, one cell for all
of those. A divergence is a sum over cells; its slope in the student's log-probability of each cell is all that the
gradient in the logits takes, without the target ever being spread over the vocabulary.

Shapes: N positions, C cells, K head entries, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import FullTarget, HeadTarget, PartialTarget, RenormalisedTarget, filled

LOWEST_LOG_PROB = -1e6
"""Stands for probability zero where a product of zero and minus infinity would be undefined."""
_LARGEST_HEAD_MASS = 0.99
"""Beyond it, one minus the head's mass has lost too many digits to stand for the tail's."""

AnyHeadTarget = HeadTarget | RenormalisedTarget | PartialTarget


@dataclass(frozen=True)
class Cells:
    """log_p_NC, log_q_NC: log-probabilities, at least -1e6; both are that where a row has fewer cells.

    is_entry_NC: which cells are single ids; None if all are. sums_to_one: whether the teacher's do.
    """

    student: StudentChunk
    temperature: float
    log_p_NC: Tensor
    log_q_NC: Tensor
    is_entry_NC: Tensor | None = None
    ids_NK: Tensor | None = None
    has_tail: bool = False
    sums_to_one: bool = True

    @classmethod
    def of(cls, student: StudentChunk, target: AnyHeadTarget | FullTarget, temperature: float) -> "Cells":
        """What `target` knows of the teacher at `temperature`, beside the student."""
        log_q_NV = student.log_q(temperature)
        if not isinstance(target, AnyHeadTarget):
            return cls(student, temperature, target.log_probs(temperature), log_q_NV)
        log_p_NK, log_p_tail_N = target.log_probs(temperature)
        ids_NK = target.head_ids_NK
        is_there_NK = torch.isfinite(log_p_NK)
        log_q_NK = torch.where(is_there_NK, log_q_NV.gather(-1, ids_NK), LOWEST_LOG_PROB)
        log_p_NC, log_q_NC, is_entry_NC = log_p_NK.clamp(min=LOWEST_LOG_PROB), log_q_NK, is_there_NK
        if log_p_tail_N is not None:
            log_q_tail_N = _log_mass_outside(log_q_NV, ids_NK, log_q_NK)
            log_p_NC = torch.cat([log_p_NC, log_p_tail_N.clamp(min=LOWEST_LOG_PROB)[:, None]], dim=1)
            log_q_NC = torch.cat([log_q_NK, log_q_tail_N.clamp(min=LOWEST_LOG_PROB)[:, None]], dim=1)
            is_entry_NC = torch.cat([is_there_NK, torch.zeros_like(is_there_NK[:, :1])], dim=1)
        is_whole = not isinstance(target, PartialTarget)
        return cls(student, temperature, log_p_NC, log_q_NC, is_entry_NC, ids_NK, log_p_tail_N is not None, is_whole)

    def add_gradient(self, slope_NC: Tensor, weight: float | Tensor, total: float | None = None) -> None:
        """Leave the student the gradient of weight * a sum over cells, whose slope in log q is `slope_NC`.

        weight: a number or (N, 1). total: the sum of the slopes of each row, if it is known. In u = z / tau the
        gradient is slope_i - q_i total at a cell of one id, and q_j (slope_tail / q_tail - total) at an id of the tail.
        `slope_NC` may be overwritten.
        """
        student, scale = self.student, weight / self.temperature
        total_N1 = slope_NC.sum(dim=-1, keepdim=True) if total is None else total
        if self.ids_NK is None:
            student.add_softmax(self.temperature, -total_N1 * scale)
            student.add(slope_NC, scale)
        elif not self.has_tail:
            student.add_softmax(self.temperature, -total_N1 * scale)
            student.add_at(self.ids_NK, slope_NC * scale)
        else:
            self._add_with_tail(slope_NC, torch.as_tensor(total_N1, device=slope_NC.device), scale)

    def _add_with_tail(self, slope_NC: Tensor, total_N1: Tensor, scale: float | Tensor) -> None:
        """A multiple of q per position, put right on the head; where the tail is small that would cancel digits."""
        assert self.ids_NK is not None, "only heads have tails"
        total_N1 = total_N1.expand(len(slope_NC), 1)
        slope_NK, slope_tail_N1 = slope_NC[:, :-1], slope_NC[:, -1:]
        q_NK, log_q_tail_N1 = self.log_q_NC[:, :-1].exp(), self.log_q_NC[:, -1:]
        is_small_N1 = q_NK.sum(dim=-1, keepdim=True) > _LARGEST_HEAD_MASS
        ratio_N1 = torch.where(is_small_N1, 0.0, slope_tail_N1 / log_q_tail_N1.exp())
        common_N1 = torch.where(is_small_N1, 0.0, ratio_N1 - total_N1)
        self.student.add_softmax(self.temperature, common_N1 * scale)
        head_NK = torch.where(is_small_N1, 0.0, slope_NK - q_NK * ratio_N1)
        self.student.add_at(self.ids_NK, head_NK * scale)
        if not is_small_N1.any():
            return
        rows_M = is_small_N1[:, 0].nonzero()[:, 0]
        log_q_MV = self.student.log_q(self.temperature)[rows_M]
        gradient_MV = (log_q_MV - log_q_tail_N1[rows_M]).exp_().mul_(slope_tail_N1[rows_M])
        gradient_MV -= log_q_MV.exp() * total_N1[rows_M]
        head_MK = (slope_NK - q_NK * total_N1)[rows_M]
        assert self.is_entry_NC is not None, "heads know which entries are there"
        there_MK = self.is_entry_NC[rows_M, :-1]
        gradient_MV.scatter_(-1, self.ids_NK[rows_M], filled(head_MK, there_MK))
        self.student.add_rows(rows_M, gradient_MV * (scale if isinstance(scale, float) else scale[rows_M]))


def _log_mass_outside(log_q_NV: Tensor, ids_NK: Tensor, log_q_NK: Tensor) -> Tensor:
    """log of the sum of q over all ids not in `ids_NK`, (N,); a small one is summed over those ids themselves."""
    head_mass_N = log_q_NK.exp().sum(dim=-1)
    is_small_N = head_mass_N > _LARGEST_HEAD_MASS
    outside_N = torch.log1p(-head_mass_N.clamp(max=_LARGEST_HEAD_MASS))
    if is_small_N.any():
        tail_NV = log_q_NV[is_small_N].scatter_(-1, ids_NK[is_small_N], -torch.inf)
        outside_N[is_small_N] = tail_NV.logsumexp(dim=-1)
    return outside_N
