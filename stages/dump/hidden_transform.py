"""The Karhunen-Loeve transform of one layer's hidden states, fitted on calibration positions.

What is coded is what is left of a state when its mean, the mean of its input id and, with delta, a linear prediction
from the layer before are taken off; the basis diagonalises its covariance, and one step serves all coefficients.

Shapes: N positions, V vocabulary, D width.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tristill.cache.hidden import BASIS_UNIT, TABLE_UNITS_PER_STEP, CodedLayer
from tristill.stages.dump.hidden import BeyondError, coefficients
from tristill.stages.errors import CheckpointError
from tristill.stages.fidelity.hidden import relative_error
from tristill.stages.targets.hidden import LayerTransform

_SHRINKAGE_POSITIONS = 0.5
"""An id's mean counts as if it had this much of a position more, where its embedding predicts it."""
_RIDGE_POSITIONS = 4
"""Weight of the ridge of a linear prediction, as a number of positions of mean size."""
_CODED_ABOVE_STEPS = 0.15
"""A coefficient is coded if its deviation is more than this: others would be zero nearly always."""
_MOST_TRIALS = 20
_AIMED_AT = (0.95, 0.98)
"""Relative errors that are taken, as shares of the target: other text errs about 1% more than the calibration's."""
_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)
_LARGEST_INT16 = np.iinfo(np.int16).max


@dataclass(frozen=True)
class HiddenPositions:
    """Some positions of a layer: states, input ids, and what a reader has of the layer before, if it is used."""

    states_ND: Tensor
    ids_N: Tensor
    before_ND: Tensor | None

    def kept(self, transform: LayerTransform) -> tuple[Tensor, Tensor, Tensor]:
        """(coefficients, residual, states as a reader will have them)."""
        coefficients_NR = coefficients(transform, self.states_ND, self.ids_N, self.before_ND)
        residual_ND = transform.residual(coefficients_NR, self.before_ND)
        return coefficients_NR, residual_ND, transform.states(residual_ND, self.ids_N)


@dataclass(frozen=True)
class LayerFit:
    """Float64. basis_DD: rows are directions, those of the largest deviation first; the rest in these coordinates."""

    mean_D: Tensor
    basis_DD: Tensor
    table_VD: Tensor
    map_DD: Tensor | None
    deviation_D: Tensor

    def at(self, step: float) -> tuple[CodedLayer, dict[str, Tensor]]:
        """The layer with its tables as they are stored, for one step."""
        table_VD = (self.table_VD * (TABLE_UNITS_PER_STEP / step)).round().clamp(-_LARGEST_INT16, _LARGEST_INT16)
        tables = {
            "mean": self.mean_D.float(),
            "basis": as_basis(self.basis_DD),
            "table": table_VD.to(torch.int16),
        }
        if self.map_DD is not None:
            tables["map"] = (self.map_DD / step).clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16).half()
        rank = max(1, int((self.deviation_D > _CODED_ABOVE_STEPS * step).sum()))
        return CodedLayer(step=step, rank=rank), tables


def as_basis(basis_KD: Tensor) -> Tensor:
    """Orthonormal rows as they are stored."""
    return (basis_KD / BASIS_UNIT).round().clamp(-_LARGEST_INT16, _LARGEST_INT16).to(torch.int16)


def fit_layer(positions: HiddenPositions, embedding_VD: Tensor) -> LayerFit:
    """The transform of these positions' states.

    An id's entry in the table is the mean of its positions, drawn to what is predicted linearly from its embedding: the
    calibration need not have seen it.
    """
    states_ND, ids_N = positions.states_ND.double(), positions.ids_N
    mean_D = states_ND.mean(dim=0)
    rest_ND = states_ND - mean_D
    embedding_VD = embedding_VD.double()
    embedding_VD -= embedding_VD[ids_N].mean(dim=0)
    prior_VD = embedding_VD @ _linear_map(embedding_VD[ids_N], rest_ND)
    rest_ND -= prior_VD[ids_N]
    counts_V = torch.bincount(ids_N, minlength=len(prior_VD)).double()
    sums_VD = torch.zeros_like(prior_VD).index_add_(0, ids_N, rest_ND)
    own_VD = sums_VD / (counts_V + _SHRINKAGE_POSITIONS)[:, None]
    rest_ND -= own_VD[ids_N]
    map_DD: Tensor | None = None
    if positions.before_ND is not None:
        before_ND = positions.before_ND.double()
        map_DD = _linear_map(before_ND, rest_ND)
        rest_ND -= before_ND @ map_DD
    variances_D, columns_DD = torch.linalg.eigh(rest_ND.T @ rest_ND / len(rest_ND))
    basis_DD = columns_DD.flip(1).T
    return LayerFit(
        mean_D=mean_D,
        basis_DD=basis_DD,
        table_VD=(prior_VD + own_VD) @ basis_DD.T,
        map_DD=None if map_DD is None else map_DD @ basis_DD.T,
        deviation_D=variances_D.flip(0).clamp(min=0).sqrt(),
    )


def _linear_map(inputs_ND: Tensor, outputs_NE: Tensor) -> Tensor:
    """(D, E) of least squares with a slight ridge."""
    gram_DD = inputs_ND.T @ inputs_ND
    gram_DD.diagonal().add_(_RIDGE_POSITIONS * inputs_ND.square().mean().clamp(min=1e-30))
    map_DE: Tensor = torch.linalg.solve(gram_DD, inputs_ND.T @ outputs_NE)
    return map_DE


def at_relative_error(
    fit: LayerFit, held_out: HiddenPositions, target: float, layer: int
) -> tuple[CodedLayer, dict[str, Tensor]]:
    """The layer at a step whose relative error on the positions `held_out` is just below the target, or less.

    The error is about in proportion to the step, which is sought between the largest that met the target and the
    smallest that did not.
    """
    limit = float(held_out.states_ND.double().square().mean().sqrt())
    step, largest_met, smallest_missed = target * limit * 12**0.5, 0.0, math.inf
    found: tuple[CodedLayer, dict[str, Tensor]] | None = None
    error, beyond = math.inf, None
    for _ in range(_MOST_TRIALS):
        coded, tables = fit.at(step)
        try:
            stored_ND = held_out.kept(LayerTransform.of(coded, tables))[2]
        except BeyondError as exc:  # a coarser step may code it
            beyond, largest_met = BeyondError(exc.steps, layer, step), max(step, largest_met)
            step = 2 * step if math.isinf(smallest_missed) else math.sqrt(largest_met * smallest_missed)
            continue
        error = relative_error(held_out.states_ND, stored_ND)
        if error <= _AIMED_AT[1] * target:
            found, largest_met = (coded, tables), step
            if error > _AIMED_AT[0] * target or step >= limit:
                break
        else:
            smallest_missed = step
        step *= min(max(sum(_AIMED_AT) / 2 * target / max(error, 1e-30), 0.25), 2.0)
        if not largest_met < step < smallest_missed:
            step = math.sqrt(largest_met * smallest_missed)
    if found is not None:
        return found
    reached = "" if math.isinf(error) else f"comes to {error:.3g} at best, "
    finest = "" if beyond is None else f" (finer steps do not code its largest state, {beyond.largest:.6g} in size)"
    raise CheckpointError(
        f"cache.hidden.coding.relative_error: layer {layer} {reached}expected {target:g}{finest}; ask for more, or "
        "keep hidden states as int8, float16 or float32"
    )
