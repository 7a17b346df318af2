"""Weights of n bits with a learned step size, one per matrix: LSQ.

Esser et al. 2020, Learned Step Size Quantization (arXiv 1902.08153), with levels -Q..Q, Q = 2^(bits - 1) - 1, where the
paper has -Q - 1 too: symmetric, as the other codes here are.
"""

import math
from typing import Any

import torch
from torch import Tensor

from stages.quantize.nbit import largest_level

_SMALLEST_MEAN = 1e-5


def initial_step(weight: Tensor, bits: int) -> Tensor:
    """2 mean |W| / sqrt(Q), the mean at least 1e-5; a scalar of the weight's dtype. arXiv 1902.08153, section 2.1."""
    mean = weight.abs().mean().clamp(min=_SMALLEST_MEAN)
    return mean * (2 / math.sqrt(largest_level(bits)))


def learned_quantize(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """step * round(clip(W / step, -Q, Q)), half to even; of the weight's shape and dtype. Equations 1 and 2.

    `step` is a positive scalar. Gradients are the paper's, with x = W / step and g the gradient that arrives:

    - of W: g where |x| < Q, else 0 (section 2.3);
    - of step: 1 / sqrt(N Q) * sum g * (round(x) - x where |x| < Q, else Q sign(x)), N the number of weights
      (equation 3 and section 2.2).
    """
    quantized: Tensor = _LearnedStep.apply(weight, step, largest_level(bits))  # type: ignore[no-untyped-call]
    return quantized


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, largest: int) -> Tensor:
        ctx.save_for_backward(weight, step)
        ctx.largest = largest
        return (weight / step).clamp_(-largest, largest).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, step = ctx.saved_tensors
        (gradient,) = gradients
        scaled = weight / step
        is_inside = scaled.abs() < ctx.largest
        slope = scaled.clamp(-ctx.largest, ctx.largest).round_().sub_(scaled * is_inside)
        step_gradient = (gradient * slope).sum() / math.sqrt(weight.numel() * ctx.largest)
        return gradient * is_inside, step_gradient, None
