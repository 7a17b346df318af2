"""Fits the tables and models of a profile, measures how well it serves, and picks its setting if a target is given.

Shapes: N positions, V vocabulary.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tristill.cache.arrays import ArraySpec, compressed_bytes, ids_dtype
from tristill.cache.calibration import Calibration, FidelityPoint
from tristill.cache.coding.streams import Histograms
from tristill.cache.parts import Part, PartCoder
from tristill.cache.profiles.dense import DenseProfile
from tristill.cache.profiles.heads import fit_tail_predictor
from tristill.cache.profiles.plain_topk import PlainTopKProfile
from tristill.cache.profiles.profile import Need
from tristill.cache.profiles.sampled import LARGEST_DRAWS, SampledProfile
from tristill.cache.profiles.topk import TopKProfile
from tristill.cache.spec import AnyProfile
from tristill.stages.dump.config import DenseSettings, DumpConfig, FidelityConfig, ProfileSettings, TransformSettings
from tristill.stages.dump.extract import LogitsBeyondError, TeacherPositions, target_arrays
from tristill.stages.dump.transform import LogitTransform, fit_transform
from tristill.stages.errors import CheckpointError
from tristill.stages.fidelity.measure import FeaturePairs, fidelity, full_gradients
from tristill.stages.losses.chunked_head import chunks
from tristill.stages.progress import say
from tristill.stages.targets.stored import make_targets

DEFAULT_TEMPERATURES = (1.0, 2.0, 5.0)
_RELATIVE_TO_LARGEST = {"head_logits", "tail_logsumexp"}
_STEPS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05)
_HEAD_PROBABILITIES = (0.1, 0.05, 0.02, 0.01, 0.005)
_DRAWS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 50, 80, 128, LARGEST_DRAWS)


@dataclass(frozen=True)
class Sample:
    """What a calibration looks at: positions to fit on, others to measure on with a student's features there.

    total_positions: of the whole cache that count, over which the tables are spread. measured_ids_PT: all input ids of
    the windows measured on; None where all count, which then are those of `measure`.
    """

    fit: TeacherPositions
    measure: TeacherPositions
    student: FeaturePairs
    student_name: str
    total_positions: int
    measured_ids_PT: np.ndarray | None = None


@dataclass(frozen=True)
class Fitted:
    """A profile with all its tables and models, by their own names."""

    profile: AnyProfile
    tables: dict[str, np.ndarray]


def calibrate(config: DumpConfig, sample: Sample, request: str) -> tuple[Fitted, Calibration]:
    """The profile with its tables, and what was measured; says what was picked and why."""
    fitter = Fitter(sample)
    target = config.fidelity
    if target is None:
        fitted = fitter.fit(config.profile)
        point = fitter.measure(fitted, declared_temperatures(fitted.profile))
        return fitted, Calibration(
            request=request,
            student=sample.student_name,
            positions=len(sample.measure.final_ND),
            profile=fitted.profile.model_dump(mode="json"),
            target=None,
            points=(point,),
            chosen=0,
        )
    temperatures = tuple(sorted(target.max_gradient_angle_deg or declared_temperatures(config.profile)))
    check_served(config.profile, temperatures, len(sample.measure.head_VD))
    points: list[FidelityPoint] = []
    candidates: list[Fitted] = []
    for settings in search(config.profile, target, points):
        try:
            fitted = fitter.fit(settings)
            point = fitter.measure(fitted, temperatures)
        except LogitsBeyondError:
            if not points:
                raise
            say(f"calibration: {points[-1].settings['step']} is the finest step that codes all logits")
            continue
        candidates.append(fitted)
        points.append(point)
        say(f"calibration: {describe(points[-1])}")
    chosen = pick(points, target)
    say(f"calibration: picked {describe(points[chosen])}, for {target}")
    return candidates[chosen], Calibration(
        request=request,
        student=sample.student_name,
        positions=len(sample.measure.final_ND),
        profile=candidates[chosen].profile.model_dump(mode="json"),
        target=str(target),
        points=tuple(points),
        chosen=chosen,
    )


def check_served(settings: ProfileSettings, temperatures: Iterable[float], vocab_size: int) -> None:
    """Raise CheckpointError if the profile refuses a temperature that the target names."""
    if isinstance(settings, SampledProfile | TopKProfile):
        for temperature in temperatures:
            if reason := settings.unserved(Need("forward_kl", temperature), vocab_size):
                raise CheckpointError(f"cache.fidelity: {reason}")


class Fitter:
    """Fits settings on one sample; what does not depend on the settings is computed once."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._full = sample.measure.targets
        self._gradients: dict[float, torch.Tensor] = {}
        self._transform: LogitTransform | None = None
        self._mean_p_V: torch.Tensor | None = None

    @property
    def mean_probabilities(self) -> torch.Tensor:
        """The teacher's mean distribution over the positions to fit on."""
        if self._mean_p_V is None:
            fit = self._sample.fit
            total_V = torch.zeros(len(fit.head_VD), device=fit.head_VD.device)
            for rows in chunks(len(fit.final_ND), len(fit.head_VD)):
                total_V += torch.softmax(fit.logits(rows), dim=-1).sum(dim=0)
            self._mean_p_V = total_V / len(fit.final_ND)
        return self._mean_p_V

    def fit(self, settings: ProfileSettings) -> Fitted:
        """Tables and models for these settings."""
        match settings:
            case PlainTopKProfile():
                return Fitted(settings, {})
            case DenseSettings():
                head_VD = self._sample.fit.head_VD.float().cpu().numpy()
                dense = DenseProfile(width=head_VD.shape[1], temperature=settings.temperature)
                return Fitted(dense, {"output_matrix": head_VD})
            case TransformSettings():
                profile, tables = self._fitted_transform().at(settings)
                return self._with_models(profile, tables)
            case SampledProfile() | TopKProfile():
                return self._with_models(settings, {})

    def _fitted_transform(self) -> LogitTransform:
        if self._transform is None:
            fit = self._sample.fit
            self._transform = fit_transform(fit.final_ND, fit.input_ids_N, fit.head_VD, self.mean_probabilities)
        return self._transform

    def _with_models(self, profile: AnyProfile, tables: dict[str, np.ndarray]) -> Fitted:
        fit = self._sample.fit
        vocab_size = len(fit.head_VD)
        order = np.argsort(-self.mean_probabilities.cpu().numpy(), kind="stable")
        tables = {**tables, "ids_by_rank": order.astype(ids_dtype(vocab_size))}
        arrays = target_arrays(profile, tables, fit)
        if "tail_logsumexp" in arrays:
            tables["tail_predictor"] = fit_tail_predictor(fit.place.gathered(arrays["tail_logsumexp"]))
        assert profile.make_coder is not None, "only coded profiles have models"
        histograms = Histograms(profile.models(vocab_size))
        given = {name: fit.place.gathered(array) for name, array in as_given(arrays, profile, fit).items()}
        profile.make_coder(tables).write(given, fit.place, histograms)
        return Fitted(profile, {**tables, **histograms.frequencies()})

    def measure(self, fitted: Fitted, temperatures: Iterable[float]) -> FidelityPoint:
        """Bytes, angles, norm ratios and divergences of a fitted profile, measured through its coder and back."""
        measure, student = self._sample.measure, self._sample.student
        arrays = target_arrays(fitted.profile, fitted.tables, measure)
        given = as_given(arrays, fitted.profile, measure)
        stored, num_bytes = round_trip(fitted, given, measure)
        num_bytes += sum(map(compressed_bytes, plain_arrays(arrays, self._sample)))
        table_bytes = sum(map(compressed_bytes, fitted.tables.values()))
        signals = {"teacher_entropy": arrays["teacher_entropy"] / np.float32(8)}
        flat = {
            name: torch.from_numpy(np.ascontiguousarray(measure.place.gathered(array))).to(measure.final_ND.device)
            for name, array in {**stored, **signals}.items()
        }
        targets = make_targets(fitted.profile, fitted.tables, len(measure.head_VD), measure.final_ND.device)(
            flat, measure.input_ids_N
        )
        results = {}
        for temperature in temperatures:
            if fitted.profile.unserved(Need("forward_kl", temperature), len(measure.head_VD)):
                continue
            if temperature not in self._gradients:
                self._gradients |= full_gradients(student, self._full, [temperature])
            results[f"{temperature:.12g}"] = fidelity(
                student, targets, self._full, self._gradients[temperature], temperature
            )
        return FidelityPoint(
            settings=knobs(fitted.profile),
            bytes_per_position=num_bytes / len(measure.final_ND) + table_bytes / self._sample.total_positions,
            angle_deg={tau: found.angle_deg for tau, found in results.items()},
            norm_ratio={tau: found.norm_ratio for tau, found in results.items()},
            kl_nats={tau: found.kl_nats for tau, found in results.items()},
        )


def round_trip(
    fitted: Fitted, given: dict[str, np.ndarray], positions: TeacherPositions
) -> tuple[dict[str, np.ndarray], int]:
    """(arrays as a reader gets them, bytes that the target part takes)."""
    profile = fitted.profile
    if profile.make_coder is None:
        return given, sum(map(compressed_bytes, given.values()))
    vocab_size = len(positions.head_VD)
    part = Part(
        "target",
        profile.arrays(vocab_size, positions.place.context_length),
        profile.models(vocab_size),
        profile.tables(vocab_size),
        profile.make_coder,
    )
    coder = PartCoder(part, {f"target.{name}": table for name, table in fitted.tables.items()})
    payload = coder.encode(given, positions.place)
    return coder.decode(np.frombuffer(payload, np.uint8), positions.place), len(payload)


def as_given(arrays: dict[str, np.ndarray], profile: AnyProfile, positions: TeacherPositions) -> dict[str, np.ndarray]:
    """The profile's arrays in the types that a writer is given."""
    specs = profile.arrays(len(positions.head_VD), positions.place.context_length)
    return {spec.name: as_stored(arrays[spec.name], spec) for spec in specs}


def as_stored(values: np.ndarray, spec: ArraySpec) -> np.ndarray:
    """`values` in a stored type. Logits so far below the largest that float16 does not reach them are its lowest.

    Raises CheckpointError for hidden states, scales and coefficients that the type does not hold.
    """
    if spec.dtype != "<f2":
        return values.astype(spec.dtype)
    end = float(np.finfo(np.float16).max)
    if spec.name in _RELATIVE_TO_LARGEST:
        return np.where(np.isneginf(values), values, values.clip(-end, end)).astype(spec.dtype)
    if not (np.abs(values) <= end).all():
        raise CheckpointError(_beyond(spec.name, float(np.abs(values).max()), end))
    return values.astype(spec.dtype)


def _beyond(name: str, found: float, end: float) -> str:
    """Why an array does not go into float16, and what would hold it."""
    layer = re.fullmatch(r"hidden_(\d+)(_scale)?", name)
    if layer is None:
        return (
            f"cache.profile: found {found:.6g} in {name}, which is stored in float16 and ends at {end:.0f}; use "
            "profile topk or sampled, which keep no states"
        )
    if layer[2]:
        what, advice = f"a state beyond {127 * end:.0f}, which int8 with a scale in float16", ""
    else:
        what, advice = f"a state of {found:.6g}, which float16", ", or 'int8', which has a scale per position"
    return (
        f"cache.hidden: layer {layer[1]}: found {what} does not hold (it ends at {end:.0f}); set cache.hidden.coding "
        f"to {{ kind = 'float32' }}{advice}"
    )


def plain_arrays(arrays: dict[str, np.ndarray], sample: Sample) -> Iterator[np.ndarray]:
    """What every cache stores of the measured windows beside the profile's arrays: ids, mask and signals."""
    measure = sample.measure
    ids = measure.input_ids_N.cpu().numpy() if sample.measured_ids_PT is None else sample.measured_ids_PT
    yield ids.astype(ids_dtype(len(measure.head_VD)))
    if measure.counts_PT is not None:
        yield measure.counts_PT
    yield arrays["teacher_entropy"]
    yield arrays["label_log_prob"]


def declared_temperatures(profile: AnyProfile | ProfileSettings) -> tuple[float, ...]:
    """The temperatures to measure a profile at: those that it declares, or 1, 2 and 5 if it serves any."""
    match profile:
        case TopKProfile():
            return profile.temperatures
        case SampledProfile() | PlainTopKProfile():
            return (profile.temperature,)
    return tuple(sorted({profile.temperature, *DEFAULT_TEMPERATURES, *getattr(profile, "temperatures", ())}))


def knobs(profile: AnyProfile) -> dict[str, float | int | bool | str]:
    """The plain settings of a profile, flat."""
    flat: dict[str, float | int | bool | str] = {}
    for name, value in profile.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": part for key, part in value.items()}
        elif not isinstance(value, list):
            flat[name] = value
    return flat


def describe(point: FidelityPoint) -> str:
    """One line of a measured point."""
    shown = {"step", "rank", "draws", "head.probability", "dither"}
    settings = ", ".join(f"{name} {value}" for name, value in point.settings.items() if name in shown)
    angles = ", ".join(f"{angle:.1f} at tau {tau}" for tau, angle in point.angle_deg.items())
    return f"{settings}: {point.bytes_per_position:.1f} bytes/position, degrees {angles}"


def search(settings: ProfileSettings, target: FidelityConfig, points: list[FidelityPoint]) -> Iterator[ProfileSettings]:
    """Settings worth measuring, each chosen after those before it were: `points` grows as they are."""
    match settings:
        case SampledProfile():
            yield from _until_met((settings.model_copy(update={"draws": n}) for n in _DRAWS), target, points)
        case TopKProfile():
            yield from _until_met((_with_head(settings, p) for p in _HEAD_PROBABILITIES), target, points)
        case TransformSettings():
            for probability in _HEAD_PROBABILITIES:
                finer = (_with_head(settings.model_copy(update={"step": step}), probability) for step in _STEPS)
                yield from _until_met(finer, target, points)
        case _:
            raise CheckpointError(
                f"cache.fidelity: profile {settings.kind} has no setting to pick; leave cache.fidelity out, or use "
                "profile sampled, topk or transform"
            )


def _with_head(settings: TopKProfile | TransformSettings, probability: float) -> TopKProfile | TransformSettings:
    return settings.model_copy(update={"head": settings.head.model_copy(update={"probability": probability})})


def _until_met(
    finer: Iterable[ProfileSettings], target: FidelityConfig, points: list[FidelityPoint]
) -> Iterator[ProfileSettings]:
    """Settings from coarse to fine, until the target is met, or the bytes are spent."""
    for settings in finer:
        yield settings
        if target.max_gradient_angle_deg is not None and _meets(points[-1], target):
            return
        if target.bytes_per_position is not None and points[-1].bytes_per_position > target.bytes_per_position:
            return


def _meets(point: FidelityPoint, target: FidelityConfig) -> bool:
    if target.bytes_per_position is not None:
        return point.bytes_per_position <= target.bytes_per_position
    assert target.max_gradient_angle_deg is not None
    found = {float(tau): angle for tau, angle in point.angle_deg.items()}
    return all(found.get(float(f"{tau:.12g}"), 180.0) <= angle for tau, angle in target.max_gradient_angle_deg.items())


def pick(points: list[FidelityPoint], target: FidelityConfig) -> int:
    """The cheapest point that meets the target angles, or the one of the smallest worst angle within the bytes."""
    meeting = [i for i, point in enumerate(points) if _meets(point, target)]
    if not meeting:
        best = min(
            points, key=lambda point: _worst(point) if target.max_gradient_angle_deg else point.bytes_per_position
        )
        raise CheckpointError(
            f"cache.fidelity: no setting gives {target}; the nearest of {len(points)} is {describe(best)}; loosen the "
            "target, or use another profile"
        )
    if target.bytes_per_position is not None:
        return min(meeting, key=lambda i: _worst(points[i]))
    return min(meeting, key=lambda i: points[i].bytes_per_position)


def _worst(point: FidelityPoint) -> float:
    return max((angle for angle in point.angle_deg.values() if angle is not None), default=180.0)
