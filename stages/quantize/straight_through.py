"""The straight-through estimator."""

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
