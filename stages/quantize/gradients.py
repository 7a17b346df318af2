"""Gradient rules of quantised values: the straight-through estimator, and that of a learned step."""

import math
from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, quantized: Tensor) -> Tensor:  # noqa: ARG004
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


def straight_through(value: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` in the forward pass, the identity on `value` in the backward pass; both of one shape.

    Bengio et al. 2013, Estimating or Propagating Gradients Through Stochastic Neurons (arXiv 1308.3432).
    """
    straight: Tensor = _StraightThrough.apply(value, quantized)  # type: ignore[no-untyped-call]
    return straight


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
