"""Ternary weights by the absolute mean: BitNet b1.58."""

from torch import Tensor

from tristill.stages.quantize.config import ScalePer
from tristill.stages.quantize.ternary import TernaryWeight, blocks, round_to_trits

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
