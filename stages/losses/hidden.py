"""Losses between hidden states of student and teacher.

Shapes: B batch, T positions, D width of the student, E width of the teacher.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tristill.stages.losses.hidden_config import HiddenLossConfig
from tristill.stages.models.language_model import State


class HiddenLoss(nn.Module):
    """Mean over mapped layers and positions of how far P_l s_l is from t_m(l), in float32; never negative.

    mse: mean over the width of the squared difference. cosine: 1 - cos. l2: |P_l s_l - t_m(l)|. With `normalise` both
    sides are layer-normalised first. Romero et al. 2015, FitNets (arXiv 1412.6550); Sanh et al. 2019, DistilBERT (arXiv
    1910.01108) for cosine.

    P_l is a linear map from the student's width to the teacher's, one per mapped student layer, where the widths differ
    or it is asked for; trained with the student and thrown away after. It starts as the identity, cut or padded with
    zeros. It maps student to teacher: a learned map the other way could make both sides zero.
    """

    def __init__(
        self, config: HiddenLossConfig, layers: dict[int, int], student_width: int, teacher_width: int
    ) -> None:
        """`layers` maps student layers to teacher layers."""
        super().__init__()
        self.name = f"hidden_{config.kind}"
        self._kind: Literal["mse", "cosine", "l2"] = config.kind
        self._normalise = config.normalise
        self.pairs = {State(config.output, own): State(config.output, theirs) for own, theirs in layers.items()}
        is_projected = student_width != teacher_width or config.projection == "always"
        self.projections = nn.ParameterDict(
            {str(layer): nn.Parameter(torch.eye(teacher_width, student_width)) for layer in layers if is_projected}
        )

    def forward(
        self,
        student: Mapping[State, Tensor],
        teacher: Mapping[State, Tensor],
        stride: int = 1,
        counts_BT: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss of student[l] (B, T, D) against teacher[m] (B, T', E) for every mapped pair l = m.

        With a stride, the teacher is known at positions 0, stride, 2 stride, .., and only these are compared; with
        `counts_BT`, only those of them that count: zero if there is none.
        """
        kept_BT = None if counts_BT is None else counts_BT[:, ::stride]
        if kept_BT is not None and not kept_BT.any():
            parts = [*(student[own] for own in self.pairs), *self.projections.values()]
            return torch.stack([part.sum() for part in parts]).sum() * 0.0
        distances = []
        for own, theirs in self.pairs.items():
            with torch.autocast(student[own].device.type, enabled=False):
                state_BTE, target_BTE = student[own][:, ::stride].float(), teacher[theirs].float()
                if kept_BT is not None:
                    state_BTE, target_BTE = state_BTE[kept_BT][None], target_BTE[kept_BT][None]
                if str(own.layer) in self.projections:
                    state_BTE = F.linear(state_BTE, self.projections[str(own.layer)])
                distances.append(self._distance(state_BTE, target_BTE))
        return torch.stack(distances).mean()

    def _distance(self, student_BTE: Tensor, teacher_BTE: Tensor) -> Tensor:
        if self._normalise:
            student_BTE, teacher_BTE = (F.layer_norm(state, state.shape[-1:]) for state in (student_BTE, teacher_BTE))
        if self._kind == "mse":
            return F.mse_loss(student_BTE, teacher_BTE)
        if self._kind == "cosine":
            return 1 - F.cosine_similarity(student_BTE, teacher_BTE, dim=-1).clamp(max=1).mean()
        distance_BT: Tensor = torch.linalg.vector_norm(student_BTE - teacher_BTE, dim=-1)
        return distance_BT.mean()
