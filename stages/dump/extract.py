"""From the teacher's features to the arrays that a profile stores, of whole windows.

Shapes: P windows, T positions, N positions that count, V vocabulary, D width, S basis vectors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tristill.cache.profiles.dense import DenseProfile
from tristill.cache.profiles.plain_topk import PlainTopKProfile
from tristill.cache.profiles.profile import Place
from tristill.cache.profiles.sampled import SampledProfile
from tristill.cache.profiles.topk import TopKProfile
from tristill.cache.profiles.transform import LARGEST_COEFFICIENT, TABLE_UNITS_PER_STEP, TransformProfile
from tristill.cache.spec import AnyProfile
from tristill.stages.dump.draws import draws, uniforms
from tristill.stages.dump.ensemble import TeacherMixture
from tristill.stages.dump.heads import Distribution, adaptive_head, signals
from tristill.stages.dump.topk import topk_target
from tristill.stages.errors import CheckpointError
from tristill.stages.losses.chunked_head import chunks
from tristill.stages.losses.target import ComputedTargets


@dataclass(frozen=True)
class TeacherPositions:
    """The teacher at the positions of some windows that count, and who they are.

    final_ND: float32. head_VD: the output matrix, float32 or bfloat16. input_ids_N, labels_N: int64. windows: their
    numbers in the split. others: further teachers there. shares: of all teachers, the one of final_ND first.
    counts_PT: bool, which positions of the windows these are; None if all. softcap: of the teacher of final_ND.
    """

    final_ND: Tensor
    head_VD: Tensor
    input_ids_N: Tensor
    labels_N: Tensor
    split: str
    windows: list[int]
    others: tuple[ComputedTargets, ...] = ()
    shares: tuple[float, ...] = (1.0,)
    counts_PT: np.ndarray | None = None
    softcap: float | None = None

    @property
    def place(self) -> Place:
        """A place for these windows, which need not be consecutive: dither only needs them to be distinct."""
        num_windows = len(self.windows)
        context_length = len(self.final_ND) // num_windows if self.counts_PT is None else self.counts_PT.shape[1]
        return Place(self.split, 0, num_windows, context_length, self.counts_PT)

    @property
    def targets(self) -> ComputedTargets | TeacherMixture:
        """The whole distribution of the teacher, or of the mixture of all of them."""
        own = ComputedTargets(self.final_ND, self.head_VD, self.softcap)
        return TeacherMixture((own, *self.others), self.shares) if self.others else own

    def logits(self, rows: slice) -> Tensor:
        """Logits of some rows, computed in the type of the output matrix, float32."""
        return self.targets.chunk(rows, self.head_VD.dtype).logits_NV


Extract = Callable[[Tensor, Distribution, slice], dict[str, Tensor]]


def target_arrays(
    profile: AnyProfile, tables: Mapping[str, np.ndarray], positions: TeacherPositions
) -> dict[str, np.ndarray]:
    """The profile's arrays and the two signals, (P, T, ..) each, of at least one position; `tables` are the profile's.

    Logits exist for about half a million elements at a time, in float32.
    """
    extract = extractor(profile, tables, positions)
    parts = []
    for rows in chunks(len(positions.final_ND), len(positions.head_VD)):
        logits_NV = positions.logits(rows)
        distribution = Distribution.of(logits_NV, profile.temperature)
        found = signals(distribution, positions.labels_N[rows])
        parts.append({**found, **extract(logits_NV, distribution, rows)})
    flat = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: positions.place.scattered(tensor.cpu().numpy()) for name, tensor in flat.items()}


def extractor(profile: AnyProfile, tables: Mapping[str, np.ndarray], positions: TeacherPositions) -> Extract:
    """What gives the profile's arrays of some rows from their logits and distribution, which it may overwrite."""
    device = positions.final_ND.device
    match profile:
        case PlainTopKProfile():
            return lambda logits_NV, _, __: topk_target(logits_NV, profile.top_k, profile.temperature)
        case TopKProfile():
            return lambda _, distribution, __: adaptive_head(
                distribution, profile.head, profile.temperatures, with_tail=profile.tail != "nothing"
            )
        case SampledProfile():
            place = positions.place
            random = uniforms(profile, positions.split, positions.windows, place.context_length)
            random_PTU = random.reshape(place.num_windows, place.context_length, -1)
            random_NU = torch.from_numpy(place.gathered(random_PTU)).to(device)
            return lambda _, distribution, rows: draws(distribution.p_NV, random_NU[rows], profile)
        case DenseProfile():
            return lambda _, __, rows: eight_bits(positions.final_ND[rows].float())
        case TransformProfile():
            encoder_DR, mean_D, table_VS = (
                torch.from_numpy(tables[name].copy()).to(device) for name in ("encoder", "encoder_mean", "table")
            )

            def transformed(_: Tensor, distribution: Distribution, rows: slice) -> dict[str, Tensor]:
                known_NR = table_VS[positions.input_ids_N[rows], : profile.rank].float() / TABLE_UNITS_PER_STEP
                coefficients_NR = (positions.final_ND[rows].float() - mean_D) @ encoder_DR - known_NR
                require_codable(coefficients_NR, profile.step)
                head = adaptive_head(distribution, profile.head, profile.temperatures, with_tail=True)
                return {"coefficients": coefficients_NR, **head}

            return transformed


class LogitsBeyondError(CheckpointError):
    """A coefficient of the transformed logits is larger than can be coded."""


def require_codable(coefficients_NR: Tensor, step: float) -> None:
    """Raises LogitsBeyondError for a coefficient, in steps, that a reader would have otherwise: past 2047."""
    largest = float(coefficients_NR.abs().max())
    if not largest <= LARGEST_COEFFICIENT:
        least = float(f"{1.1 * largest * step / LARGEST_COEFFICIENT:.2g}")
        raise LogitsBeyondError(
            f"cache.profile: found logits {largest * step:.6g} nats away from what their input id says, expected at "
            f"most {LARGEST_COEFFICIENT} steps of {step:.3g}, which is all that transform codes; set "
            f"cache.profile.step to {least:g} or more, or kind to sampled or topk, which code no such differences"
        )


def eight_bits(final_ND: Tensor) -> dict[str, Tensor]:
    """`final` = round(h / scale) in -127..127 and `final_scale` = max |h| / 127, rounded to float16 first."""
    scale_N = (final_ND.abs().amax(dim=-1) / 127).clamp(min=1e-6).half()
    final = (final_ND / scale_N.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {"final": final, "final_scale": scale_N}
