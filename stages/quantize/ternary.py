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


_SMALLEST_SCALE = 1e-5


def absmean_scale(weight_OI: Tensor, scale_per: ScalePer = "tensor") -> Tensor:
    """gamma = mean |W| over the whole matrix, a row or a group, at least 1e-5; (R, G) float32.

    Ma et al. 2024, The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits (arXiv 2402.17764), equation 3,
    which is of the whole matrix.
    """
    return blocks(weight_OI.float(), scale_per).abs().mean(dim=-1).clamp_(min=_SMALLEST_SCALE)


def absmean_ternary(weight_OI: Tensor, scale_per: ScalePer = "tensor") -> TernaryWeight:
    """gamma * clip(round(W / gamma), -1, 1), half to even; arXiv 2402.17764, equations 1 to 3.

    Quantising it again changes no trit; the scale shrinks by the share of trits that are not zero. Gradients are those
    of the identity: see straight_through.
    """
    return round_to_trits(weight_OI.float(), absmean_scale(weight_OI, scale_per))


_THRESHOLD = 0.7
_SMALLEST_SCALE = 1e-5


def twn_ternary(weight_OI: Tensor, scale_per: ScalePer = "tensor") -> TernaryWeight:
    """sign(W) where |W| > delta = 0.7 mean |W|, else 0; the scale is the mean |W| of those kept, at least 1e-5.

    Li et al. 2016, Ternary Weight Networks (arXiv 1605.04711), equations 3, 5 and 6: about the delta that minimises the
    squared error of normal and uniform weights, and the scale that minimises it for these trits. Here of the whole
    matrix, a row or a group. Quantising it again changes nothing. Gradients are those of the identity: see
    straight_through.
    """
    weight_RGC = blocks(weight_OI.float(), scale_per)
    magnitude_RGC = weight_RGC.abs()
    threshold_RG = _THRESHOLD * magnitude_RGC.mean(dim=-1)
    kept_RGC = magnitude_RGC > threshold_RG[..., None]
    scale_RG = (magnitude_RGC * kept_RGC).sum(dim=-1).div_(kept_RGC.sum(dim=-1).clamp_(min=1)).clamp_(_SMALLEST_SCALE)
    trits = weight_RGC.sign().mul_(kept_RGC).to(torch.int8)
    return TernaryWeight(trits.reshape(weight_OI.shape), scale_RG, threshold_RG)
