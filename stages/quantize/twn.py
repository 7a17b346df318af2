"""Ternary weights by a threshold: Ternary Weight Networks."""

import torch
from torch import Tensor

from tristill.stages.quantize.config import ScalePer
from tristill.stages.quantize.ternary import TernaryWeight, blocks

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
