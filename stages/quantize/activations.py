"""8-bit activations by the absolute maximum of each position (BitNet b1.58), and their integer product with trits.

Shapes: N positions, I inputs and O outputs of a layer.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tristill.stages.quantize.quantizer import TernaryWeight

_LARGEST_CODE = 127
_SMALLEST_ABSMAX = 1e-5


class ActivationCodes(NamedTuple):
    """Inputs of a layer as integers: codes * step. Shapes: N positions, I inputs."""

    codes_NI: Tensor
    """int8, from -127 to 127."""
    step_N1: Tensor
    """Positive, float32."""

    def values(self, dtype: torch.dtype) -> Tensor:
        """codes * step, (N, I), computed in float32."""
        return self.codes_NI.float().mul_(self.step_N1).to(dtype)


@torch.no_grad()
def absmax_codes(activations: Tensor) -> ActivationCodes:
    """round(x * s), half to even, with s = 127 / max |x| over the last dimension; and step = 1 / s. In float32.

    Ma et al. 2024 (arXiv 2402.17764), section 2: per-token absmax without zero point. The absolute maximum is taken as
    at least 1e-5.
    """
    exact_NI = activations.reshape(-1, activations.shape[-1]).float()
    scaled_NI = exact_NI.abs()
    scale_N1 = _LARGEST_CODE / scaled_NI.amax(dim=-1, keepdim=True).clamp_(min=_SMALLEST_ABSMAX)
    torch.mul(exact_NI, scale_N1, out=scaled_NI)  # the same memory: on large inputs it costs more than the arithmetic
    return ActivationCodes(scaled_NI.round_().to(torch.int8), scale_N1.reciprocal_())


@torch.no_grad()
def absmax_quantize(activations: Tensor) -> Tensor:
    """round(x * s) / s, see absmax_codes; of the shape and dtype of x. Its gradient: see straight_through."""
    return absmax_codes(activations).values(activations.dtype).view(activations.shape)


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
