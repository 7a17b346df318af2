"""The product of 8-bit activations and ternary weights in integers, and its gradients.

Shapes: N positions, I inputs and O outputs of a layer.
"""

from typing import Any

import torch
from torch import Tensor

from tristill.stages.quantize.absmax import ActivationCodes
from tristill.stages.quantize.ternary import TernaryWeight

_SMALLEST_CUDA_ROWS = 17
_CUDA_MULTIPLE = 8


def multiplies_integers(x: Tensor, weight: TernaryWeight) -> bool:
    """Whether int8 products of these shapes are to be had: on a CPU always, on CUDA in multiples of 8.

    Not for scales per group, whose sums would have to be scaled before they are added.
    """
    if weight.scale_RG.shape[1] > 1:
        return False
    rows = x.shape[:-1].numel()
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
    product: Tensor = _IntegerProduct.apply(  # type: ignore[no-untyped-call]
        x, codes.codes_NI, codes.step_N1, weight_OI, ternary.trits_OI, ternary.scale_RG, values_OI
    )
    return product


class _IntegerProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes_NI: Tensor,
        step_N1: Tensor,
        weight_OI: Tensor,
        trits_OI: Tensor,
        scale_R1: Tensor,
        values_OI: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(codes_NI, step_N1, values_OI)
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight_OI.dtype
        # Converting first and scaling in place is twice as fast as a product of mixed types. The result is no view:
        # some models add to it in place.
        sums_NO = torch._int_mm(codes_NI, trits_OI.T)  # noqa: SLF001 - has no other name
        y = sums_NO.view(*x.shape[:-1], len(trits_OI)).float()
        y_NO = y.view(sums_NO.shape)
        if scale_R1.numel() == 1:
            y_NO.mul_(step_N1 * scale_R1)
        else:
            y_NO.mul_(step_N1).mul_(scale_R1.T)
        return y.to(values_OI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes_NI, step_N1, values_OI = ctx.saved_tensors
        dtype = values_OI.dtype
        g_NO = gradients[0].reshape(-1, len(values_OI)).to(dtype)
        gx = gw = None
        if ctx.needs_input_grad[0]:
            gx = (g_NO @ values_OI).to(ctx.x_dtype).view(ctx.x_shape)
        if ctx.needs_input_grad[3]:
            gw = (g_NO.T @ ActivationCodes(codes_NI, step_N1).values(dtype)).to(ctx.weight_dtype)
        return gx, None, None, gw, None, None, None
