"""The product of 8-bit activations and ternary weights in integers, and its gradients.

Shapes: N positions, I inputs and O outputs of a layer.
"""

from typing import Any

import torch
from torch import Tensor

from stages.quantize.absmax import ActivationCodes
from stages.quantize.ternary import TernaryWeight

_SMALLEST_CUDA_ROWS = 17
_CUDA_MULTIPLE = 8


def multiplies_integers(x: Tensor, weight: TernaryWeight) -> bool:
    """Whether int8 products of these shapes are to be had: on a CPU always, on CUDA in multiples of 8.

    Not for scales per group, whose sums would have to be scaled before they are added.
    """
    if weight.scale_RG.shape[1] > 1:
        return False
    rows = x.numel() // x.shape[-1]
    is_aligned = all(size % _CUDA_MULTIPLE == 0 for size in weight.trits_OI.shape) and rows >= _SMALLEST_CUDA_ROWS
    return x.device.type == "cpu" or (x.device.type == "cuda" and is_aligned)


def integer_product(
    x: Tensor, codes: ActivationCodes, weight_OI: Tensor, ternary: TernaryWeight, values_OI: Tensor
) -> Tensor:
    """Q_a(x) Q_w(W)^T, (..., O), exact but for rounding: integers are summed in int32, and scaled.

    In float32; under autocast rounded to its dtype, as other products are. `codes` are those of x (..., I), `ternary`
    those of weight_OI, which only receives the gradient, and `values_OI` the same dequantised, in the dtype that
    gradients are computed in. These are straight-through: with g that arrives, g Q_w(W) for x and g^T Q_a(x) for the
    weight, in the dtype of the result.
    """
    product: Tensor = _IntegerProduct.apply(x, codes, weight_OI, ternary, values_OI)  # type: ignore[no-untyped-call]
    return product


class _IntegerProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: ActivationCodes, weight_OI: Tensor, ternary: TernaryWeight, values_OI: Tensor
    ) -> Tensor:
        ctx.codes, ctx.values_OI, ctx.x_shape = codes, values_OI, x.shape
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight_OI.dtype
        # Converting first and scaling in place is twice as fast as a product of mixed types.
        y_NO = torch._int_mm(codes.codes_NI, ternary.trits_OI.T).float()  # noqa: SLF001 - has no other name
        if ternary.scale_RG.numel() == 1:
            y_NO.mul_(codes.step_N1 * ternary.scale_RG)
        else:
            y_NO.mul_(codes.step_N1).mul_(ternary.scale_RG.T)
        return y_NO.to(values_OI.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        dtype = ctx.values_OI.dtype
        g_NO = gradients[0].flatten(0, -2).to(dtype)
        gx = (g_NO @ ctx.values_OI).to(ctx.x_dtype).view(ctx.x_shape) if ctx.needs_input_grad[0] else None
        gw = (g_NO.T @ ctx.codes.values(dtype)).to(ctx.weight_dtype) if ctx.needs_input_grad[2] else None
        return gx, None, gw, None, None
