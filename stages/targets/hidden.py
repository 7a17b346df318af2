"""Hidden states of a cache, as they are stored, back to states of full width (docs/format.md, section 6).

Shapes: B windows, T' kept positions, N = B T', K stored width, R coded coefficients, D width of the states.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tristill.cache.hidden import BASIS_UNIT, TABLE_UNITS_PER_STEP, CodedLayer, HiddenSpec, TransformHidden

Arrays = Mapping[str, Tensor]


@dataclass(frozen=True)
class Projection:
    """A fixed orthogonal reduction: states = mean + reduced @ basis."""

    mean_D: Tensor
    basis_KD: Tensor

    @classmethod
    def of(cls, tables: Arrays) -> "Projection | None":
        """From a layer's own tables; None if it has none."""
        if "basis" not in tables:
            return None
        return cls(tables["mean"], tables["basis"].float() * BASIS_UNIT)

    def reduced(self, states: Tensor) -> Tensor:
        """(.., D) to (.., K)."""
        return (states - self.mean_D) @ self.basis_KD.T

    def restored(self, reduced: Tensor) -> Tensor:
        """(.., K) to (.., D)."""
        return self.mean_D + reduced @ self.basis_KD


@dataclass(frozen=True)
class LayerTransform:
    """Of one layer: states = mean + step (table[input id] + residual) @ basis, everything else in steps.

    residual = (coefficients, 0, ..) + residual of the layer before @ map; without a map, the coefficients alone.
    """

    mean_D: Tensor
    basis_DD: Tensor
    table_VD: Tensor
    map_DD: Tensor | None
    step: float
    rank: int

    @classmethod
    def of(cls, layer: CodedLayer, tables: Arrays) -> "LayerTransform":
        """From a layer's own tables."""
        mapped = tables.get("map")
        return cls(
            mean_D=tables["mean"],
            basis_DD=tables["basis"].float() * BASIS_UNIT,
            table_VD=tables["table"],
            map_DD=None if mapped is None else mapped.float(),
            step=layer.step,
            rank=layer.rank,
        )

    def known(self, ids_N: Tensor) -> Tensor:
        """What the input ids say, (N, D)."""
        return self.table_VD[ids_N].float() / TABLE_UNITS_PER_STEP

    def predicted(self, before_ND: Tensor | None, count: int) -> Tensor:
        """What the residual of the layer before says of this one's, (N, D)."""
        if self.map_DD is None:
            return torch.zeros(count, len(self.mean_D), device=self.mean_D.device)
        assert before_ND is not None, "layers are gone through in order"
        return before_ND @ self.map_DD

    def residual(self, coefficients_NR: Tensor, before_ND: Tensor | None) -> Tensor:
        """(N, D), for stored coefficients."""
        residual_ND = self.predicted(before_ND, len(coefficients_NR))
        residual_ND[:, : self.rank] += coefficients_NR.float()
        return residual_ND

    def states(self, residual_ND: Tensor, ids_N: Tensor) -> Tensor:
        """(N, D), float32."""
        return torch.addmm(self.mean_D, self.known(ids_N) + residual_ND, self.basis_DD * self.step)

    def wanted(self, states_ND: Tensor, ids_N: Tensor) -> Tensor:
        """The residual that would give these states exactly, (N, D)."""
        return (states_ND - self.mean_D) @ (self.basis_DD.T / self.step) - self.known(ids_N)


class HiddenTransforms:
    """The transforms of all layers of a cache, or none."""

    def __init__(self, hidden: HiddenSpec, tables: Mapping[str, np.ndarray], device: torch.device) -> None:
        """`tables` are those of the whole cache, `hidden_<layer>.<name>`."""
        self.projections: dict[int, Projection | None] = {}
        self.layers: dict[int, LayerTransform] = {}
        for place, layer in enumerate(hidden.layers):
            prefix = f"hidden_{layer}."
            own = {
                name.removeprefix(prefix): torch.from_numpy(table.copy()).to(device)
                for name, table in tables.items()
                if name.startswith(prefix) and name.removeprefix(prefix) in _NEEDED_TABLES
            }
            if isinstance(hidden.coding, TransformHidden):
                self.layers[layer] = LayerTransform.of(hidden.coding.coded[place], own)
            else:
                self.projections[layer] = Projection.of(own)


_NEEDED_TABLES = {"mean", "basis", "table", "map"}


class HiddenStates:
    """Gives hidden states back from what a cache stores of them."""

    def __init__(self, hidden: HiddenSpec, tables: Mapping[str, np.ndarray], device: torch.device) -> None:
        """`tables` are those of the whole cache."""
        self._hidden = hidden
        self._transforms = HiddenTransforms(hidden, tables, device)

    def states(
        self,
        stored: Mapping[int, Tensor],
        scales: Mapping[int, Tensor],
        input_ids_BT: Tensor,
        layers: tuple[int, ...],
    ) -> dict[int, Tensor]:
        """Of these layers, (B, T', D) float32.

        stored: per layer (B, T', K), every layer that these need included (HiddenSpec.layers_to_read). scales: per
        layer (B, T') in units of 1 / 127 of the largest, for 8 bits. input_ids_BT: of all positions, kept or not.
        """
        if isinstance(self._hidden.coding, TransformHidden):
            return self._transformed(stored, input_ids_BT[:, :: self._hidden.stride], layers)
        found = {}
        for layer in layers:
            # Of 8 bits the product converts as it goes, which gives the same floats in one pass.
            scale = scales[layer].float()[..., None] if layer in scales else None
            states = stored[layer].float() if scale is None else stored[layer] * scale
            projection = self._transforms.projections[layer]
            found[layer] = states if projection is None else projection.restored(states)
        return found

    def _transformed(self, stored: Mapping[int, Tensor], ids_BT: Tensor, layers: tuple[int, ...]) -> dict[int, Tensor]:
        found = {}
        before_ND: Tensor | None = None
        ids_N = ids_BT.flatten()
        for layer in self._hidden.layers:
            if layer not in stored:
                continue
            transform = self._transforms.layers[layer]
            before_ND = transform.residual(stored[layer].flatten(0, 1), before_ND)
            if layer in layers:
                found[layer] = transform.states(before_ND, ids_N).view(*ids_BT.shape, -1)
        return found
