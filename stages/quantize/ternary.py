"""A ternary matrix: trits and the scales of its blocks. What training multiplies by, and what exports pack."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.quantize.config import ScalePer, group_columns


@dataclass(frozen=True)
class TernaryWeight:
    """W = scale * trits. Shapes: O rows, I columns; R is O or 1; G groups of I / G neighbouring columns."""

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
        trits_OGC = self.trits_OI.reshape(len(self.trits_OI), self.scale_RG.shape[1], -1)
        return trits_OGC.mul(self.scale_RG[..., None]).flatten(1)

    def with_scale_of(self, dtype: torch.dtype) -> "TernaryWeight":
        """The same, its scales rounded to what a file of that dtype can hold."""
        return replace(self, scale_RG=self.scale_RG.to(dtype).float())


def blocks(weight_OI: Tensor, scale_per: ScalePer) -> Tensor:
    """The weights that share a scale, in the last dimension: (1, 1, O I), (O, 1, I) or (O, G, I / G); a view."""
    match scale_per:
        case "tensor":
            return weight_OI.reshape(1, 1, -1)
        case "row":
            return weight_OI.unsqueeze(1)
        case "group-128" | "group-256":
            return weight_OI.reshape(len(weight_OI), -1, group_columns(scale_per))


def round_to_trits(weight_OI: Tensor, scale_RG: Tensor) -> TernaryWeight:
    """clip(round(W / scale), -1, 1), half to even, with its scales."""
    scaled_OGC = weight_OI.reshape(len(weight_OI), scale_RG.shape[1], -1) / scale_RG[..., None]
    return TernaryWeight(scaled_OGC.round_().clamp_(-1, 1).to(torch.int8).flatten(1), scale_RG)
