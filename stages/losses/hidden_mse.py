"""Mean squared error between hidden states, through a learned projection.

Shapes: B batch, T positions, D width of the student, E width of the teacher.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn


class HiddenMSE(nn.Module):
    """Mean over layers, positions and width of (P_l s_l - t_m(l))^2, in float32; never negative.

    Romero et al. 2015, FitNets (arXiv 1412.6550). P_l is a linear map from the student's width to the teacher's, one
    per mapped student layer, trained with the student and thrown away after. It starts as the identity, cut or padded
    with zeros where the widths differ, so that equal hidden states of equal width start at zero loss.
    """

    name = "hidden_mse"

    def __init__(self, layers: dict[int, int], student_width: int, teacher_width: int) -> None:
        """`layers` maps student layers to teacher layers."""
        super().__init__()
        self.layers = layers
        self.projections = nn.ParameterDict(
            {str(layer): nn.Parameter(torch.eye(teacher_width, student_width)) for layer in self.layers}
        )

    def forward(self, student: dict[int, Tensor], teacher: dict[int, Tensor], stride: int = 1) -> Tensor:
        """Scalar loss of student[l] (B, T, D) against teacher[m] (B, T', E) for every mapped pair l = m.

        With a stride, the teacher is known at positions 0, stride, 2 stride, .., and only these are compared.
        """
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            errors = []
            for layer, mapped in self.layers.items():
                projected = F.linear(student[layer][:, ::stride].float(), self.projections[str(layer)])
                errors.append((projected - teacher[mapped].float()).square().mean())
            return torch.stack(errors).mean()
