"""Fits how hidden states are kept on calibration windows, and measures what it costs on others.

Shapes: P windows, T positions, N positions in a row, D width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tristill.cache.arrays import compressed_bytes
from tristill.cache.calibration import HiddenPoint
from tristill.cache.coding.streams import Histograms
from tristill.cache.hidden import NUM_ACTIVITIES, CodedLayer, HiddenCoding, HiddenSpec, Reduction, TransformHidden
from tristill.cache.hidden_coder import activity_edges
from tristill.cache.layout import default_windows_per_chunk
from tristill.cache.parts import Part, PartCoder
from tristill.cache.profiles.profile import Place
from tristill.stages.dump.calibrate import as_stored
from tristill.stages.dump.hidden import BeyondError, hidden_arrays
from tristill.stages.dump.hidden_config import HiddenSettings, TransformHiddenSettings
from tristill.stages.dump.hidden_transform import HiddenPositions, as_basis, at_relative_error, fit_layer
from tristill.stages.errors import CheckpointError
from tristill.stages.fidelity.hidden import hidden_fidelity
from tristill.stages.targets.hidden import HiddenStates, HiddenTransforms, LayerTransform


@dataclass(frozen=True)
class HiddenWindows:
    """Hidden states (P, T, D) by layer, and the input ids there. counts_PT: which positions count; None if all."""

    states: dict[int, Tensor]
    input_ids_PT: Tensor
    counts_PT: np.ndarray | None = None

    def positions(self, layer: int, stride: int) -> tuple[Tensor, Tensor]:
        """(states_ND, ids_N) of every `stride`-th position of the windows, float32 and int64, as far as it counts."""
        return self.counted(self.states[layer][:, ::stride], stride).float(), self.counted(
            self.input_ids_PT[:, ::stride], stride
        )

    def counted(self, values_PT: Tensor, stride: int) -> Tensor:
        """Of values (P, T', ..) at every `stride`-th position those that count, (N, ..)."""
        if self.counts_PT is None:
            return values_PT.flatten(0, 1)
        return values_PT[torch.from_numpy(self.counts_PT[:, ::stride]).to(values_PT.device)]

    @property
    def num_positions(self) -> int:
        """Positions that count, kept or not."""
        return self.input_ids_PT.numel() if self.counts_PT is None else int(np.count_nonzero(self.counts_PT))


@dataclass(frozen=True)
class HiddenSample:
    """Windows to fit on, others to measure on with a student's states there.

    embedding_VD: the teacher's. total_positions: of the whole cache, over which the tables are spread.
    """

    fit: HiddenWindows
    measure: HiddenWindows
    student: HiddenWindows
    embedding_VD: Tensor
    total_positions: int
    query_width: int | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.embedding_VD)


@dataclass(frozen=True)
class FittedHidden:
    """How hidden states are kept, with all tables and models, `hidden_<layer>.<name>`."""

    spec: HiddenSpec
    tables: dict[str, np.ndarray]


def fit_hidden(settings: HiddenSettings, sample: HiddenSample) -> FittedHidden:
    """The spec and tables of these settings, for all layers of the sample. Deterministic."""
    layers = tuple(sorted(sample.fit.states))
    width = sample.fit.states[layers[0]].shape[-1]
    coding = settings.coding
    if isinstance(coding, TransformHiddenSettings):
        return _fit_transforms(settings, coding, sample, layers, width)
    if coding.reduction is not None and coding.reduction.width > width:
        raise CheckpointError(
            f"cache.hidden.coding.reduction.width: found {coding.reduction.width}, but hidden states have {width} "
            "dimensions; choose fewer, or leave the reduction out"
        )
    tables = {}
    for layer in layers if coding.reduction else ():
        assert coding.reduction is not None, "there are no layers otherwise"
        for name, table in _reduction_tables(coding.reduction, sample.fit.positions(layer, 1)[0]).items():
            tables[f"hidden_{layer}.{name}"] = table.cpu().numpy()
    return FittedHidden(_spec(settings, sample, layers, width, coding), tables)


def _spec(
    settings: HiddenSettings, sample: HiddenSample, layers: tuple[int, ...], width: int, coding: HiddenCoding
) -> HiddenSpec:
    return HiddenSpec(
        layers=layers,
        width=width,
        stride=settings.stride,
        coding=coding,
        output=settings.output,
        query_width=sample.query_width if settings.output == "qkv" else None,
    )


def _reduction_tables(reduction: Reduction, states_ND: Tensor) -> dict[str, Tensor]:
    """`mean` of the states and `basis`, orthonormal rows."""
    states_ND = states_ND.double()
    mean_D = states_ND.mean(dim=0)
    width = states_ND.shape[1]
    if reduction.kind == "pca":
        rest_ND = states_ND - mean_D
        columns_DD = torch.linalg.eigh(rest_ND.T @ rest_ND).eigenvectors.flip(1)
    else:
        generator = torch.Generator().manual_seed(reduction.seed)
        random_DD = torch.randn(width, width, generator=generator, dtype=torch.float64)
        columns_DD = torch.linalg.qr(random_DD).Q.to(states_ND.device)
    return {"mean": mean_D.float(), "basis": as_basis(columns_DD[:, : reduction.width].T)}


def _fit_transforms(
    settings: HiddenSettings,
    coding: TransformHiddenSettings,
    sample: HiddenSample,
    layers: tuple[int, ...],
    width: int,
) -> FittedHidden:
    """Layer after layer. Fitted on all positions, so that a stride leaves no fewer of them."""
    coded: list[CodedLayer] = []
    tables: dict[str, Tensor] = {}
    coefficients: dict[int, Tensor] = {}
    fit_before: Tensor | None = None
    measure_before: Tensor | None = None
    for layer in layers:
        fit = HiddenPositions(*sample.fit.positions(layer, 1), fit_before)
        measure = HiddenPositions(*sample.measure.positions(layer, settings.stride), measure_before)
        found, own = at_relative_error(fit_layer(fit, sample.embedding_VD), measure, coding.relative_error, layer)
        transform = LayerTransform.of(found, own)
        try:
            coefficients[layer], fit_residual, _ = fit.kept(transform)
        except BeyondError as exc:
            raise BeyondError(exc.steps, layer, transform.step) from exc
        if coding.delta:
            fit_before, measure_before = fit_residual, measure.kept(transform)[1]
        coded.append(found)
        tables |= {f"hidden_{layer}.{name}": table for name, table in own.items()}
    resolved = TransformHidden(delta=coding.delta, coded=tuple(coded))
    spec = _spec(settings, sample, layers, width, resolved)
    stored = {name: table.cpu().numpy() for name, table in tables.items()}
    for layer in layers:
        stored |= _models(spec.part(layer, sample.vocab_size, 1), coefficients[layer].cpu().numpy())
    return FittedHidden(spec, stored)


def _models(part: Part, coefficients_NR: np.ndarray) -> dict[str, np.ndarray]:
    assert part.coder is not None, "transform coded"
    edges = activity_edges(coefficients_NR, NUM_ACTIVITIES)
    histograms = Histograms(part.models)
    place = Place("train", 0, len(coefficients_NR), 1)
    part.coder({"activity_edges": edges}).write({part.name: coefficients_NR}, place, histograms)
    own = {"activity_edges": edges, **histograms.frequencies()}
    return {f"{part.name}.{name}": table for name, table in own.items()}


def measure_hidden(fitted: FittedHidden, sample: HiddenSample) -> tuple[HiddenPoint, ...]:
    """Of every layer its bytes and its loss of signal, through the coder and back."""
    spec, windows = fitted.spec, sample.measure
    device = windows.input_ids_PT.device
    transforms = HiddenTransforms(spec, fitted.tables, device)
    arrays = hidden_arrays(spec, transforms, windows.states, windows.input_ids_PT)
    stored: dict[int, Tensor] = {}
    scales: dict[int, Tensor] = {}
    num_bytes: dict[int, int] = {}
    for layer in spec.layers:
        part = spec.part(layer, sample.vocab_size, windows.input_ids_PT.shape[1])
        given = {array.name: as_stored(arrays[array.name].cpu().numpy(), array) for array in part.arrays}
        read, num_bytes[layer] = round_trip(part, fitted.tables, given, windows)
        stored[layer] = torch.from_numpy(read[part.name]).to(device)
        if spec.has_scales:
            scales[layer] = torch.from_numpy(read[f"{part.name}_scale"]).to(device)
    found = HiddenStates(spec, fitted.tables, device).states(stored, scales, windows.input_ids_PT, spec.layers)
    points = []
    for layer in spec.layers:
        true_ND, _ = windows.positions(layer, spec.stride)
        student_ND, _ = sample.student.positions(layer, spec.stride)
        fidelity = hidden_fidelity(student_ND, true_ND, windows.counted(found[layer], spec.stride))
        own = [table for name, table in fitted.tables.items() if name.startswith(f"hidden_{layer}.")]
        points.append(
            HiddenPoint(
                layer=layer,
                bytes_per_position=num_bytes[layer] / windows.num_positions,
                table_bytes_per_position=sum(map(compressed_bytes, own)) / sample.total_positions,
                relative_error=fidelity.relative_error,
                angle_deg=fidelity.angle_deg,
                norm_ratio=fidelity.norm_ratio,
            )
        )
    return tuple(points)


def round_trip(
    part: Part, tables: dict[str, np.ndarray], given: dict[str, np.ndarray], windows: HiddenWindows
) -> tuple[dict[str, np.ndarray], int]:
    """(arrays as a reader gets them, bytes that they take), in chunks as large as those of a cache."""
    num_windows, context_length = windows.input_ids_PT.shape
    counts_PT = windows.counts_PT
    if not part.is_coded:
        whole = Place("train", 0, num_windows, context_length, counts_PT).strided(part.stride)
        stored = {name: whole.scattered(whole.gathered(array)) for name, array in given.items()}
        return stored, sum(map(compressed_bytes, stored.values()))
    coder, num_bytes = PartCoder(part, tables), 0
    parts = []
    per_chunk = default_windows_per_chunk(context_length)
    for first in range(0, num_windows, per_chunk):
        rows = slice(first, min(first + per_chunk, num_windows))
        counts = None if counts_PT is None else counts_PT[rows]
        place = Place("train", first, rows.stop - first, context_length, counts)
        payload = coder.encode({name: array[rows] for name, array in given.items()}, place)
        num_bytes += len(payload)
        parts.append(coder.decode(np.frombuffer(payload, np.uint8), place)[part.name])
    return {part.name: np.concatenate(parts)}, num_bytes
