"""Losses that look at the order of the teacher's logits alone: ranking of its largest, and its first against all.

Shapes: N positions, K entries.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import Target, ordered


@dataclass(frozen=True)
class Ranking:
    """Mean of log(1 + exp(-(z_i - z_j))) over pairs of the teacher's largest entries with p_i > p_j, z the student's.

    Burges et al. 2005, RankNet, section 3; on a teacher's head: Reddi et al. 2021, RankDistil. `entries` of the
    largest are compared, or as many as the target has. Positive even at equality, since larger margins lower it.
    `temperature` is the one that the target is read at.
    """

    temperature: float
    entries: int = 8
    name: ClassVar[str] = "ranking"
    needs_teacher: ClassVar[bool] = True

    def per_position(
        self, student: StudentChunk, labels_N: Tensor, target: Target | None, weight: float | Tensor = 1.0
    ) -> Tensor:
        """See DistributionTerm."""
        del labels_N
        ids_NK, log_p_NK = ordered(target).largest(self.entries, self.temperature)
        z_NK = student.logits_NV.gather(-1, ids_NK)
        margins_NKK = z_NK[:, :, None] - z_NK[:, None, :]
        is_pair_NKK = (log_p_NK[:, :, None] > log_p_NK[:, None, :]) & torch.isfinite(log_p_NK[:, None, :])
        num_pairs_N1 = is_pair_NKK.sum(dim=(1, 2)).clamp(min=1)[:, None]
        value_N = torch.where(is_pair_NKK, F.softplus(-margins_NKK), 0.0).sum(dim=(1, 2)) / num_pairs_N1[:, 0]
        if student.wants_gradient:
            pull_NKK = torch.where(is_pair_NKK, torch.sigmoid(-margins_NKK), 0.0)
            student.add_at(ids_NK, (pull_NKK.sum(dim=1) - pull_NKK.sum(dim=2)) / num_pairs_N1 * weight)
        return value_N


@dataclass(frozen=True)
class Top1Hinge:
    """max(0, margin - (z_t - max of the other z)), t the teacher's most likely id, z the student's logits.

    Crammer and Singer 2001, multiclass hinge, with the teacher's choice for the label.
    """

    margin: float = 1.0
    name: ClassVar[str] = "top1_hinge"
    needs_teacher: ClassVar[bool] = True

    def per_position(
        self, student: StudentChunk, labels_N: Tensor, target: Target | None, weight: float | Tensor = 1.0
    ) -> Tensor:
        """See DistributionTerm."""
        del labels_N
        top_N1 = ordered(target).top1()[:, None]
        two = student.logits_NV.topk(2, dim=-1)
        is_first_N1 = two.indices[:, :1] == top_N1
        rival_N1 = torch.where(is_first_N1, two.indices[:, 1:], two.indices[:, :1])
        rival_z_N1 = torch.where(is_first_N1, two.values[:, 1:], two.values[:, :1])
        value_N1 = (self.margin - student.logits_NV.gather(-1, top_N1) + rival_z_N1).clamp(min=0)
        if student.wants_gradient:
            slope_N1 = (value_N1 > 0).to(value_N1.dtype) * weight
            student.add_at(top_N1, -slope_N1)
            student.add_at(rival_N1, slope_N1)
        return value_N1[:, 0]
