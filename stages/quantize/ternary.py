"""A ternary matrix, or a stack of them: trits and scales. Training multiplies by it, exports pack it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tristill.stages.quantize.config import ScalePer, group_columns


@dataclass(frozen=True)
class TernaryWeight:
    """W = scale * trits. Shapes: O rows, I columns; R is O or 1; G groups of I / G neighbouring columns.

    A stack has one more dimension before these, in all its tensors.
    """

    trits_OI: Tensor
    """int8, each -1, 0 or 1."""
    scale_RG: Tensor
    """Positive, float32: (1, 1) of the whole matrix, (O, 1) of each row, (O, G) of each group in a row."""
    own_threshold_RG: Tensor | None = None
    """See threshold; None where trits are rounded."""

    @property
    def threshold(self) -> Tensor:
        """(R, G): the magnitude of latent weights above which trits are not zero."""
        return self.scale_RG / 2 if self.own_threshold_RG is None else self.own_threshold_RG

    def dequantized(self) -> Tensor:
        """scale * trits, (O, I) float32."""
        trits_OGC = in_groups(self.trits_OI, self.scale_RG.shape[-1])
        return trits_OGC.mul(self.scale_RG[..., None]).flatten(-2)

    def with_scale_of(self, dtype: torch.dtype) -> "TernaryWeight":
        """The same, its scales rounded to what a file of that dtype can hold."""
        return replace(self, scale_RG=self.scale_RG.to(dtype).float())


def blocks(weight_OI: Tensor, scale_per: ScalePer) -> Tensor:
    """The weights that share a scale, in the last dimension: (1, 1, O I), (O, 1, I) or (O, G, I / G).

    Of a stack, (.., O, I), the same with its dimensions first: each of its matrices has scales of its own.
    """
    match scale_per:
        case "tensor":
            return weight_OI.flatten(-2)[..., None, None, :]
        case "row":
            return weight_OI.unsqueeze(-2)
        case "group-128" | "group-256":
            return in_groups(weight_OI, weight_OI.shape[-1] // group_columns(scale_per))


def in_groups(matrix_OI: Tensor, num_groups: int) -> Tensor:
    """(.., O, G, I / G) of (.., O, I)."""
    return matrix_OI.reshape(*matrix_OI.shape[:-1], num_groups, -1)


def round_to_trits(weight_OI: Tensor, scale_RG: Tensor) -> TernaryWeight:
    """clip(round(W / scale), -1, 1), half to even, with its scales."""
    scaled_OGC = in_groups(weight_OI, scale_RG.shape[-1]) / scale_RG[..., None]
    return TernaryWeight(scaled_OGC.round_().clamp_(-1, 1).to(torch.int8).flatten(-2), scale_RG)
