"""The straight-through estimator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ARG004
        return quantize(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


def straight_through(value: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """quantize(value) in the forward pass, the identity in the backward pass.

    Bengio et al. 2013, Estimating or Propagating Gradients Through Stochastic Neurons (arXiv 1308.3432).
    """
    quantized: Tensor = _StraightThrough.apply(value, quantize)  # type: ignore[no-untyped-call]
    return quantized
