"""Weights whose step size is learned: LSQ, and stretched elastic quantisation.

Both have W_q = step * q(W / step) with a q that clips, and gradients of one form: see `through_step`. The step is one
of the whole matrix or one of each row.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tristill.stages.quantize.config import ScalePer
from tristill.stages.quantize.nbit import largest_level
from tristill.stages.quantize.ternary import TernaryWeight, blocks, round_to_trits

_SMALLEST = 1e-5
_STRETCH = 1.5
_SEQ_SHARE_CLIPPED = 0.01


def initial_step(weight_OI: Tensor, bits: int, scale_per: ScalePer = "tensor") -> Tensor:
    """2 mean |W| / sqrt(Q), Q = 2^(bits - 1) - 1, the mean at least 1e-5; (R, 1). arXiv 1902.08153, section 2.1."""
    mean = blocks(weight_OI, scale_per).abs().mean(dim=-1).clamp_(min=_SMALLEST)
    return mean * (2 / math.sqrt(largest_level(bits)))


def learned_quantize(weight_OI: Tensor, step_R1: Tensor, bits: int) -> Tensor:
    """step * round(clip(W / step, -Q, Q)), half to even; of the weight's shape and dtype. Not differentiable here.

    Esser et al. 2020, Learned Step Size Quantization (arXiv 1902.08153), equations 1 and 2, with levels -Q..Q,
    Q = 2^(bits - 1) - 1, where the paper has -Q - 1 too: symmetric, as the other codes here are. Quantising it again
    with the same step changes nothing.
    """
    largest = largest_level(bits)
    return (weight_OI / step_R1).clamp_(-largest, largest).round_().mul_(step_R1)


def learned_ternary(weight_OI: Tensor, step_R1: Tensor) -> TernaryWeight:
    """LSQ at two bits, Q = 1: trits clip(round(W / step), -1, 1), and the step as scale."""
    return round_to_trits(weight_OI.float(), step_R1)


def initial_seq_step(weight_OI: Tensor, scale_per: ScalePer = "tensor") -> Tensor:
    """max |W|, at least 1e-5; (R, 1). As ParetoQ's published code starts ternary weights."""
    return blocks(weight_OI, scale_per).abs().amax(dim=-1).clamp_(min=_SMALLEST)


def seq_ternary(weight_OI: Tensor, step_R1: Tensor) -> TernaryWeight:
    """step * round(1.5 clip(W / step, -0.99, 0.99)) / 1.5: values -2/3, 0 and 2/3 of the step.

    Liu et al. 2025, ParetoQ (arXiv 2502.02631), section 4, stretched elastic quantisation at three levels: the range
    from -step to step is cut into three of equal width. Quantising it again with the same step changes nothing.
    """
    limit = 1 - _SEQ_SHARE_CLIPPED
    scaled = (weight_OI.float() / step_R1).clamp_(-limit, limit).mul_(_STRETCH)
    return TernaryWeight(scaled.round_().to(torch.int8), step_R1 / _STRETCH)


def through_step(weight_OI: Tensor, step_R1: Tensor, quantized_OI: Tensor, largest: int) -> Tensor:
    """`quantized_OI`, which is step * q(W / step), with the gradients of LSQ; Q = `largest` is where q clips.

    With x = W / step and g the gradient that arrives:

    - of W: g where |x| < Q, else 0 (arXiv 1902.08153, section 2.3);
    - of step: 1 / sqrt(N Q) * sum g * (q(x) - x where |x| < Q, else q(x)), N the number of weights of the matrix, the
      sum over those that share the step (equation 3 and section 2.2). SEQ, Q = 1: the same, where ParetoQ's published
      code has sign x instead of q(x) = 2/3 sign x for the weights that are clipped, which is not the derivative.
    """
    quantized: Tensor = _ThroughStep.apply(weight_OI, step_R1, quantized_OI, largest)  # type: ignore[no-untyped-call]
    return quantized


class _ThroughStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, quantized: Tensor, largest: int) -> Tensor:
        ctx.save_for_backward(weight, step, quantized)
        ctx.largest = largest
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, step, quantized = ctx.saved_tensors
        (gradient,) = gradients
        scaled = weight / step
        is_inside = scaled.abs() < ctx.largest
        slope = quantized / step - scaled * is_inside
        step_gradient = (gradient * slope).sum_to_size(step.shape) / math.sqrt(weight.shape[-2:].numel() * ctx.largest)
        return gradient * is_inside, step_gradient, None, None
