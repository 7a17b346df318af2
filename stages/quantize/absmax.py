"""8-bit activations by the absolute maximum of each position: BitNet b1.58."""

from typing import NamedTuple

import torch
from torch import Tensor

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
