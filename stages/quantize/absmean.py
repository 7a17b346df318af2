"""Ternary weights by the absolute mean: BitNet b1.58."""

from torch import Tensor

_SMALLEST_SCALE = 1e-5


def absmean_scale(weight: Tensor) -> Tensor:
    """gamma = mean |W| over the whole tensor, at least 1e-5; a scalar of the weight's dtype.

    Ma et al. 2024, The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits (arXiv 2402.17764), equation 3.
    """
    return weight.abs().mean().clamp(min=_SMALLEST_SCALE)


def absmean_trits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(trits, gamma) with trits = clip(round(W / gamma), -1, 1) in the weight's dtype; arXiv 2402.17764, equations 1-3.

    Rounds half to even. gamma * trits is the quantised weight. Not differentiable: see straight_through.
    """
    scale = absmean_scale(weight)
    return (weight / scale).round_().clamp_(-1, 1), scale


def absmean_quantize(weight: Tensor) -> Tensor:
    """gamma * clip(round(W / gamma), -1, 1), of the weight's shape and dtype."""
    trits, scale = absmean_trits(weight)
    return trits.mul_(scale)
