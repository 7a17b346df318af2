"""From the teacher's hidden states to what a cache stores of them (docs/format.md, section 6).

Shapes: P windows, T positions, T' kept positions, N = P T', D width, R coded coefficients.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tristill.cache.hidden import HiddenSpec, Int8Hidden, TransformHidden
from tristill.cache.hidden_coder import LARGEST_COEFFICIENT
from tristill.stages.dump.extract import eight_bits
from tristill.stages.errors import CheckpointError
from tristill.stages.targets.hidden import HiddenTransforms, LayerTransform

DEAD_ZONE_STEPS = 0.6
"""Below this a coefficient is rounded to zero: 2 of 60 bytes less at equal relative error than with 0.5."""


class BeyondError(CheckpointError):
    """A coefficient of a transform is larger than can be coded: `steps` in size."""

    def __init__(self, steps: float, layer: int | None = None, step: float = 1.0) -> None:
        self.steps, self.largest = steps, steps * step
        where = "" if layer is None else f"layer {layer}: "
        super().__init__(
            f"cache.hidden: {where}found a state {steps * step:.6g} away from what its input id says, {steps:.0f} "
            f"steps of {step:.3g}, and kind transform codes at most {LARGEST_COEFFICIENT} of them; set "
            "cache.hidden.coding to { kind = 'float32' } or 'int8', or raise its relative_error"
        )


def hidden_arrays(
    hidden: HiddenSpec, transforms: HiddenTransforms, states: Mapping[int, Tensor], input_ids_PT: Tensor
) -> dict[str, Tensor]:
    """The arrays of all layers by name, from states (P, T, D) by layer; computed in float32."""
    kept = {layer: states[layer][:, :: hidden.stride].float() for layer in hidden.layers}
    if isinstance(hidden.coding, TransformHidden):
        return _coefficients(hidden, transforms, kept, input_ids_PT[:, :: hidden.stride])
    arrays = {}
    for layer, values in kept.items():
        projection = transforms.projections[layer]
        reduced = values if projection is None else projection.reduced(values)
        if isinstance(hidden.coding, Int8Hidden):
            in_8_bits = eight_bits(reduced.flatten(0, 1))
            shape = reduced.shape
            arrays[f"hidden_{layer}"] = in_8_bits["final"].view(shape)
            arrays[f"hidden_{layer}_scale"] = in_8_bits["final_scale"].view(shape[:2])
        else:
            arrays[f"hidden_{layer}"] = reduced
    return arrays


def _coefficients(
    hidden: HiddenSpec, transforms: HiddenTransforms, kept: Mapping[int, Tensor], ids_PT: Tensor
) -> dict[str, Tensor]:
    """Layer after layer, each predicted from what a reader will have of the one before."""
    arrays = {}
    before_ND: Tensor | None = None
    for layer in hidden.layers:
        transform = transforms.layers[layer]
        try:
            coefficients_NR = coefficients(transform, kept[layer].flatten(0, 1), ids_PT.flatten(), before_ND)
        except BeyondError as exc:
            raise BeyondError(exc.steps, layer, transform.step) from exc
        before_ND = transform.residual(coefficients_NR, before_ND)
        arrays[f"hidden_{layer}"] = coefficients_NR.view(*ids_PT.shape, transform.rank)
    return arrays


def coefficients(transform: LayerTransform, states_ND: Tensor, ids_N: Tensor, before_ND: Tensor | None) -> Tensor:
    """Rounded coefficients of one layer, (N, R) int16; `before_ND` is the residual of the layer before."""
    wanted_ND = transform.wanted(states_ND, ids_N) - transform.predicted(before_ND, len(states_ND))
    _require_codable(wanted_ND)  # of directions that are not coded too, in which the table says all
    return dead_zone_rounded(wanted_ND[:, : transform.rank])


def _require_codable(values: Tensor) -> None:
    if not bool((values.abs() < LARGEST_COEFFICIENT + 0.5).all()):
        raise BeyondError(float(values.abs().max()))


def dead_zone_rounded(values: Tensor) -> Tensor:
    """To the nearest integer, but zero below 0.6; int16. Raises BeyondError past 2047, the largest that is coded."""
    _require_codable(values)
    return torch.where(values.abs() < DEAD_ZONE_STEPS, 0.0, values.round()).to(torch.int16)
