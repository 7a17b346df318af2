"""Weights of n bits, symmetric about zero, with a scale per row; rounding errors may go to the next weight of the row.

Q = 2^(bits - 1) - 1 is the largest level; levels are -Q..Q, so that one of the 2^bits codes is not used.
"""

import torch
from torch import Tensor

_SMALLEST_ABSMAX = 1e-5
_FRACTION_BITS = 32


def largest_level(bits: int) -> int:
    """Q = 2^(bits - 1) - 1: 1 at 2 bits, 7 at 4, 127 at 8."""
    return (1 << (bits - 1)) - 1


def nbit_codes(weight: Tensor, bits: int, *, error_diffusion: bool) -> tuple[Tensor, Tensor]:
    """(codes, scale): integers in -Q..Q of the weight's shape, and s = max(max |w|, 1e-5) / Q per row, (..., 1).

    s * codes is the quantised weight. Both are float64: there max |w| / s rounds to Q and s * Q to max |w| again, so
    that quantising what was quantised changes no bit of a float32 weight. The plain code is round(w / s), half to
    even, which |w / s| <= Q keeps among the levels. Jacob et al. 2018 (arXiv 1712.05877), section 3, with the zero
    point at zero. For error diffusion see `diffuse`. Not differentiable: see straight_through.
    """
    exact = weight.double()
    scale = exact.abs().amax(dim=-1, keepdim=True).clamp_(min=_SMALLEST_ABSMAX) / largest_level(bits)
    scaled = exact / scale
    return (diffuse(scaled) if error_diffusion else scaled.round_()), scale


def nbit_quantize(weight: Tensor, bits: int, *, error_diffusion: bool) -> Tensor:
    """s * codes, of the weight's shape and dtype."""
    codes, scale = nbit_codes(weight, bits, error_diffusion=error_diffusion)
    return codes.mul_(scale).to(weight.dtype)


def diffuse(scaled: Tensor) -> Tensor:
    """Integers whose running sums are those of the rows of `scaled`, rounded; same shape and dtype.

    The sequential definition, along a row x_1..x_n, with e_0 = 0: q_j = round(x_j + e_(j-1)) and
    e_j = x_j + e_(j-1) - q_j. By induction e_j = C_j - (q_1 + .. + q_j) with C_j = x_1 + .. + x_j, and since rounding
    commutes with adding an integer, q_1 + .. + q_j = round(C_j), so that q_j = round(C_j) - round(C_(j-1)): no loop.

    round(y) = floor(y + 1/2), half upwards: half to even does not commute with adding an odd integer. Then e_j is in
    [-1/2, 1/2), and |x_j| <= Q gives |q_j| <= Q without clipping. A row's codes sum to its rounded sum; what is left
    of the last error is dropped. Sums are of fixed point with 32 fractional bits, in int64: exact in any order, without
    overflow below 2^24 weights a row.

    Floyd and Steinberg 1976 (An Adaptive Algorithm for Spatial Greyscale), in one dimension: a first-order sigma-delta
    modulator. On weights: Khodamoradi et al. 2024 (arXiv 2410.11203).
    """
    fixed = scaled.mul(2**_FRACTION_BITS).round_().long()
    rounded_sums = fixed.cumsum(dim=-1).add_(2 ** (_FRACTION_BITS - 1)).bitwise_right_shift_(_FRACTION_BITS)
    return torch.diff(rounded_sums, dim=-1, prepend=torch.zeros_like(rounded_sums[..., :1])).to(scaled.dtype)
