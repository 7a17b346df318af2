"""Ternary weights whose scale is computed: by the absolute mean (BitNet b1.58), and by a threshold (TWN)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tristill.stages.quantize.quantizer import Quantizer, TernaryWeight, blocks, round_to_trits

if TYPE_CHECKING:
    from torch import Tensor

_THRESHOLD = 0.7
_SMALLEST_SCALE = 1e-5


class Absmean(Quantizer):
    """gamma * clip(round(W / gamma), -1, 1), half to even, with gamma = mean |W|, at least 1e-5; straight-through.

    Ma et al. 2024, The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits (arXiv 2402.17764), equations 1 to
    3, there of the whole matrix, here also of a row or a group. Quantising it again changes no trit; the scale shrinks
    by the share of trits that are not zero.
    """

    is_ternary = True

    def quantize(self, weight_OI: Tensor, step_R1: Tensor | None = None) -> TernaryWeight:
        """See Quantizer."""
        del step_R1
        exact_OI = weight_OI.float()
        return round_to_trits(exact_OI, blocks(exact_OI, self.scale_per).abs().mean(dim=-1).clamp_(min=_SMALLEST_SCALE))


class Twn(Quantizer):
    """sign(W) where |W| > delta = 0.7 mean |W|, else 0; the scale is the mean |W| of those kept, at least 1e-5.

    Li et al. 2016, Ternary Weight Networks (arXiv 1605.04711), equations 3, 5 and 6: about the delta that minimises the
    squared error of normal and uniform weights, and the scale that minimises it for these trits. Here of the whole
    matrix, a row or a group. Quantising it again changes nothing. Straight-through.
    """

    is_ternary = True

    def quantize(self, weight_OI: Tensor, step_R1: Tensor | None = None) -> TernaryWeight:
        """See Quantizer."""
        del step_R1
        weight_RGC = blocks(weight_OI.float(), self.scale_per)
        magnitude_RGC = weight_RGC.abs()
        threshold_RG = _THRESHOLD * magnitude_RGC.mean(dim=-1)
        kept_RGC = magnitude_RGC > threshold_RG[..., None]
        scale_RG = (magnitude_RGC * kept_RGC).sum(dim=-1).div_(kept_RGC.sum(dim=-1).clamp_(min=1))
        trits = weight_RGC.sign().mul_(kept_RGC).char()
        return TernaryWeight(trits.reshape(weight_OI.shape), scale_RG.clamp_(_SMALLEST_SCALE), threshold_RG)
