"""8-bit activations by the absolute maximum of each position: BitNet b1.58."""

import torch
from torch import Tensor

_LARGEST_CODE = 127
_SMALLEST_ABSMAX = 1e-5


@torch.no_grad()
def absmax_quantize(activations: Tensor) -> Tensor:
    """round(x * s) / s with s = 127 / max |x| over the last dimension, clipped to [-128, 127].

    Same shape and dtype, computed in float32. Ma et al. 2024 (arXiv 2402.17764), section 2: per-token absmax without
    zero point. The absolute maximum is taken as at least 1e-5. Not differentiable: see straight_through.
    """
    exact = activations.float()
    scale = _LARGEST_CODE / exact.abs().amax(dim=-1, keepdim=True).clamp_(min=_SMALLEST_ABSMAX)
    return (exact * scale).round_().clamp_(-_LARGEST_CODE - 1, _LARGEST_CODE).div_(scale).to(activations.dtype)
