"""Weights of n bits, symmetric about zero, with a scale per row; rounding errors may go to the next weight of the row.

Q = 2^(bits - 1) - 1 is the largest level; levels are -Q..Q, so that one of the 2^bits codes is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tristill.stages.quantize.quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST_ABSMAX = 1e-5
_FRACTION_BITS = 32


def largest_level(bits: int) -> int:
    """Q = 2^(bits - 1) - 1: 1 at 2 bits, 7 at 4, 127 at 8."""
    return (1 << (bits - 1)) - 1


class Nbit(Quantizer):
    """s * round(W / s), half to even, with s = max(max |w|, 1e-5) / Q per row; straight-through.

    Computed in float64: there max |w| / s rounds to Q and s * Q to max |w| again, so that quantising what was quantised
    changes no bit of a float32 weight. Jacob et al. 2018 (arXiv 1712.05877), section 3, with the zero point at zero.
    """

    takes_bits = True

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, scale): integers in -Q..Q of the weight's shape, and s, (..., 1); both float64."""
        assert self.bits is not None, "the config refuses an nbit code without bits"
        exact = weight.double()
        scale = exact.abs().amax(dim=-1, keepdim=True).clamp_(min=_SMALLEST_ABSMAX) / largest_level(self.bits)
        return self.rounded(exact / scale), scale

    def rounded(self, scaled: Tensor) -> Tensor:
        """Integers of rows of weights in units of their scale, which are at most Q."""
        return scaled.round_()

    def quantize(self, weight_OI: Tensor, step_R1: Tensor | None = None) -> Tensor:
        """See Quantizer."""
        del step_R1
        codes, scale = self.codes(weight_OI)
        return codes.mul_(scale).to(weight_OI.dtype)

    def num_scales(self, rows: int, columns: int) -> int:
        """One a row."""
        del columns
        return rows


class NbitDiffused(Nbit):
    """The same, each rounding error added to the next weight of its row.

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

    def rounded(self, scaled: Tensor) -> Tensor:
        """Integers whose running sums are those of the rows of `scaled`, rounded."""
        fixed = scaled.mul(2**_FRACTION_BITS).round_().long()
        sums = fixed.cumsum(dim=-1).add_(2 ** (_FRACTION_BITS - 1)).bitwise_right_shift_(_FRACTION_BITS)
        return sums.diff(dim=-1, prepend=sums.new_zeros(*sums.shape[:-1], 1)).to(scaled.dtype)
