"""The whole numbers behind 8-bit activations."""

from torch import Tensor

_LARGEST_CODE = 127
_SMALLEST_ABSMAX = 1e-5


def absmax_codes(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """(round(x * s), s), s = 127 / max |x| of each row: whole numbers from -127 to 127, float32, and (T, 1) float32.

    Their quotient is absmax_quantize(x), bit for bit, and with the same source. Computed in float32; no gradient.
    """
    exact_TI = x_TI.float()
    scale_T1 = _LARGEST_CODE / exact_TI.abs().amax(dim=-1, keepdim=True).clamp_(min=_SMALLEST_ABSMAX)
    return (exact_TI * scale_T1).round_(), scale_T1
