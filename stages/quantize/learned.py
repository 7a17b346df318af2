"""Weights whose step size is learned: LSQ, and stretched elastic quantisation.

All are W_q = step * q(W / step) with a q that clips, and have gradients of one form: see gradients.through_step. The
step is one of the whole matrix or one of each row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tristill.stages.quantize.nbit import largest_level
from tristill.stages.quantize.quantizer import Quantizer, TernaryWeight, blocks, round_to_trits

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST = 1e-5
_STRETCH = 1.5
_SEQ_SHARE_CLIPPED = 0.01


class NbitLearned(Quantizer):
    """step * round(clip(W / step, -Q, Q)), half to even, Q = 2^(bits - 1) - 1.

    Esser et al. 2020, Learned Step Size Quantization (arXiv 1902.08153), equations 1 and 2, with levels -Q..Q where the
    paper has -Q - 1 too: symmetric, as the other codes here are. Quantising it again with the same step changes
    nothing.
    """

    takes_bits = True
    learns_step = True

    @property
    def largest(self) -> int:
        """Q."""
        return largest_level(self.bits or 2)

    def initial_step(self, weight_OI: Tensor) -> Tensor:
        """2 mean |W| / sqrt(Q), the mean at least 1e-5; (R, 1). arXiv 1902.08153, section 2.1."""
        mean = blocks(weight_OI, self.scale_per).abs().mean(dim=-1).clamp_(min=_SMALLEST)
        return mean * (2 / math.sqrt(self.largest))

    def quantize(self, weight_OI: Tensor, step_R1: Tensor | None = None) -> TernaryWeight | Tensor:
        """See Quantizer."""
        assert step_R1 is not None, "it is learned"
        return (weight_OI / step_R1).clamp_(-self.largest, self.largest).round_().mul_(step_R1)

    def with_gradient(self, weight_OI: Tensor, values_OI: Tensor, step_R1: Tensor | None) -> Tensor:
        """The gradients of LSQ."""
        from tristill.stages.quantize.gradients import through_step  # needs torch, which configs do without

        assert step_R1 is not None, "it is learned"
        return through_step(weight_OI, step_R1, values_OI, self.largest)


class Learned(NbitLearned):
    """LSQ at two bits, Q = 1: trits clip(round(W / step), -1, 1), and the step as scale."""

    takes_bits = False
    is_ternary = True

    def quantize(self, weight_OI: Tensor, step_R1: Tensor | None = None) -> TernaryWeight:
        """See Quantizer."""
        assert step_R1 is not None, "it is learned"
        return round_to_trits(weight_OI.float(), step_R1)


class Seq(Learned):
    """step * round(1.5 clip(W / step, -0.99, 0.99)) / 1.5: values -2/3, 0 and 2/3 of the step.

    Liu et al. 2025, ParetoQ (arXiv 2502.02631), section 4, stretched elastic quantisation at three levels: the range
    from -step to step is cut into three of equal width. Quantising it again with the same step changes nothing.
    """

    def initial_step(self, weight_OI: Tensor) -> Tensor:
        """max |W|, at least 1e-5; (R, 1). As ParetoQ's published code starts ternary weights."""
        return blocks(weight_OI, self.scale_per).abs().amax(dim=-1).clamp_(min=_SMALLEST)

    def quantize(self, weight_OI: Tensor, step_R1: Tensor | None = None) -> TernaryWeight:
        """See Quantizer."""
        assert step_R1 is not None, "it is learned"
        limit = 1 - _SEQ_SHARE_CLIPPED
        scaled = (weight_OI.float() / step_R1).clamp_(-limit, limit).mul_(_STRETCH)
        return TernaryWeight(scaled.round_().char(), step_R1 / _STRETCH)
