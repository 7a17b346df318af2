"""The base of all quantisers of weights, and the ternary weight that some of them give. Loads no torch.

Shapes: O rows, I columns; R is O or 1; G groups of I / G neighbouring columns. A stack of matrices has one more
dimension before these, and each of its matrices has scales of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ScalePer = Literal["tensor", "row", "group-128", "group-256"]


def group_columns(scale_per: ScalePer) -> int:
    """Columns of a group; 1 where rows are not cut."""
    return int(scale_per.removeprefix("group-")) if scale_per.startswith("group-") else 1


@dataclass(frozen=True)
class TernaryWeight:
    """W = scale * trits: training multiplies by it, exports pack it."""

    trits_OI: Tensor
    """int8, each -1, 0 or 1."""
    scale_RG: Tensor
    """Positive, float32: (1, 1) of the whole matrix, (O, 1) of each row, (O, G) of each group in a row."""
    own_threshold_RG: Tensor | None = None
    """See threshold; None where trits are rounded."""

    @property
    def threshold(self) -> Tensor:
        """(R, G): the magnitude of latent weights above which trits are not zero."""
        return self.scale_RG / 2 if self.own_threshold_RG is None else self.own_threshold_RG

    def dequantized(self) -> Tensor:
        """scale * trits, (O, I) float32."""
        trits_OGC = in_groups(self.trits_OI, self.scale_RG.shape[-1])
        return trits_OGC.mul(self.scale_RG[..., None]).flatten(-2)

    def with_scale_of(self, dtype: torch.dtype) -> TernaryWeight:
        """The same, its scales rounded to what a file of that dtype can hold."""
        return replace(self, scale_RG=self.scale_RG.to(dtype).float())


@dataclass(frozen=True)
class Quantizer(ABC):
    """Quantiser of weights: a subclass holds its formula, its gradient rule and its source, and no state.

    scale_per: the weights that share a scale. bits: bits per weight, where `takes_bits`.
    """

    scale_per: ScalePer = "tensor"
    bits: int | None = None

    takes_bits: ClassVar[bool] = False
    is_ternary: ClassVar[bool] = False
    """Whether `quantize` gives a TernaryWeight, which all exports can pack; else values."""
    learns_step: ClassVar[bool] = False
    """Whether the distance of levels is a parameter that is trained, which begins at `initial_step`."""

    @abstractmethod
    def quantize(self, weight_OI: Tensor, step_R1: Tensor | None = None) -> TernaryWeight | Tensor:
        """Trits with their scales, or values of the weight's shape and dtype; called without gradients.

        step_R1: the learned step, None if there is none.
        """

    def initial_step(self, weight_OI: Tensor) -> Tensor:
        """The learned step for these weights at the start, (R, 1)."""
        raise NotImplementedError

    def with_gradient(self, weight_OI: Tensor, values_OI: Tensor, step_R1: Tensor | None) -> Tensor:
        """`values_OI` with gradients for the weight, and the step if there is one; here the straight-through rule."""
        from tristill.stages.quantize.gradients import straight_through  # needs torch, which configs do without

        del step_R1
        return straight_through(weight_OI, values_OI)

    def num_scales(self, rows: int, columns: int) -> int:
        """Scales of a matrix."""
        match self.scale_per:
            case "tensor":
                return 1
            case "row":
                return rows
        return rows * columns // group_columns(self.scale_per)


def blocks(weight_OI: Tensor, scale_per: ScalePer) -> Tensor:
    """The weights that share a scale, in the last dimension: (1, 1, O I), (O, 1, I) or (O, G, I / G)."""
    match scale_per:
        case "tensor":
            return weight_OI.flatten(-2)[..., None, None, :]
        case "row":
            return weight_OI.unsqueeze(-2)
        case "group-128" | "group-256":
            return in_groups(weight_OI, weight_OI.shape[-1] // group_columns(scale_per))


def in_groups(matrix_OI: Tensor, num_groups: int) -> Tensor:
    """(.., O, G, I / G) of (.., O, I)."""
    return matrix_OI.reshape(*matrix_OI.shape[:-1], num_groups, -1)


def round_to_trits(weight_OI: Tensor, scale_RG: Tensor) -> TernaryWeight:
    """clip(round(W / scale), -1, 1), half to even, with its scales."""
    scaled_OGC = in_groups(weight_OI, scale_RG.shape[-1]) / scale_RG[..., None]
    return TernaryWeight(scaled_OGC.round_().clamp_(-1, 1).char().flatten(-2), scale_RG)
