"""Arrays of a cache, as its profile gives them, to what the losses take.

Shapes: N positions, K head entries, R coded coefficients, S basis vectors, V vocabulary, D width of the teacher.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tristill.cache.profiles.dense import DenseProfile
from tristill.cache.profiles.plain_topk import PlainTopKProfile
from tristill.cache.profiles.profile import TailTreatment
from tristill.cache.profiles.sampled import SampledProfile
from tristill.cache.profiles.topk import TopKProfile
from tristill.cache.profiles.transform import TABLE_UNITS_PER_STEP, TransformProfile
from tristill.cache.spec import AnyProfile
from tristill.stages.losses.target import (
    ComputedTargets,
    DrawnTarget,
    HeadTarget,
    PartialTarget,
    RenormalisedTarget,
    RescaledTarget,
    Rows,
    SpreadTarget,
    Target,
    Targets,
)

Arrays = Mapping[str, Tensor]
MakeTargets = Callable[[Arrays, Tensor], Targets]


def make_targets(
    profile: AnyProfile,
    tables: Mapping[str, np.ndarray],
    vocab_size: int,
    device: torch.device,
    tail: TailTreatment | None = None,
) -> MakeTargets:
    """What turns a batch's arrays (N, ..) and its input ids (N,) into Targets, on `device`.

    `tables` are the profile's own. `tail`: what is taken for the tail of a head, None for what the profile knows best;
    the profile was asked whether it serves that.
    """
    arrays_of_tables = {
        name: torch.from_numpy(table.copy()).to(device) for name, table in tables.items() if name in _NEEDED_TABLES
    }
    match profile:
        case PlainTopKProfile():
            has_tail = profile.top_k < vocab_size
            plain_tail = (tail or "bucket") if has_tail else None
            return lambda arrays, _: PlainHeads(arrays, plain_tail, profile.temperature, vocab_size)
        case TopKProfile():
            own: TailTreatment = "renormalise" if profile.tail == "nothing" else profile.tail
            return lambda arrays, _: Heads(arrays, profile.temperatures, tail or own, vocab_size)
        case SampledProfile():
            return lambda arrays, _: Draws(arrays, profile)
        case TransformProfile() if tail is not None:
            return lambda arrays, _: Heads(arrays, profile.temperatures, tail, vocab_size)
        case TransformProfile():
            basis = TransformBasis.of(profile, arrays_of_tables)
            return lambda arrays, ids_N: Transformed(arrays, ids_N, profile, basis)
        case DenseProfile():
            return lambda arrays, _: ComputedTargets(
                arrays["final"] * arrays["final_scale"].float()[:, None], arrays_of_tables["output_matrix"]
            )


_LARGEST_PREDICTED_VOCABULARY = 4096
_NEEDED_TABLES = {"mean", "basis", "basis_scale", "table", "output_matrix"}


@dataclass(frozen=True)
class PlainHeads:
    """Of `plain_topk`: every entry counts. tail: None where the head is the whole vocabulary."""

    arrays: Arrays
    tail: TailTreatment | None
    temperature: float
    vocab_size: int

    def chunk(self, rows: Rows, dtype: torch.dtype = torch.float32) -> Target:  # noqa: ARG002
        """Rows as float32 and int64; no tail when the head is the whole vocabulary."""
        head = HeadTarget(
            self.arrays["head_ids"][rows].to(torch.int64),
            self.arrays["head_logits"][rows].float(),
            self.arrays["tail_logsumexp"][rows, None].float() if self.tail else None,
            (self.temperature,),
        )
        return treated(head, self.tail, self.vocab_size) if self.tail else head


def treated(head: HeadTarget, tail: TailTreatment, vocab_size: int) -> Target:
    """A head, with its tail taken for what `tail` says (docs/methods.md)."""
    match tail:
        case "renormalise":
            return RenormalisedTarget(head)
        case "zero":
            return PartialTarget(head)
        case "uniform":
            return SpreadTarget(head, vocab_size)
        case _:
            return head


def counted_head(arrays: Arrays, rows: Rows, temperatures: tuple[float, ...]) -> HeadTarget:
    """A head of which only the first `head_count` entries are there."""
    logits_NK = arrays["head_logits"][rows].float()
    is_there_NK = torch.arange(logits_NK.shape[1], device=logits_NK.device) < arrays["head_count"][rows, None]
    tail = arrays.get("tail_logsumexp")
    return HeadTarget(
        arrays["head_ids"][rows].to(torch.int64),
        logits_NK.masked_fill_(~is_there_NK, -math.inf),
        None if tail is None else tail[rows].float(),
        temperatures,
    )


@dataclass(frozen=True)
class Heads:
    """Of `topk`, and of `transform` where its head alone is asked for."""

    arrays: Arrays
    temperatures: tuple[float, ...]
    tail: TailTreatment
    vocab_size: int

    def chunk(self, rows: Rows, dtype: torch.dtype = torch.float32) -> Target:  # noqa: ARG002
        """The head of some rows, with its tail."""
        return treated(counted_head(self.arrays, rows, self.temperatures), self.tail, self.vocab_size)


@dataclass(frozen=True)
class Draws:
    """Of `sampled`; `teacher_entropy` in nats is among the arrays."""

    arrays: Arrays
    profile: SampledProfile

    def chunk(self, rows: Rows, dtype: torch.dtype = torch.float32) -> DrawnTarget:  # noqa: ARG002
        """The draws of some rows."""
        return DrawnTarget(
            self.arrays["draw_ids"][rows].to(torch.int64),
            self.arrays["draw_counts"][rows].float() / self.profile.draws,
            self.arrays["teacher_entropy"][rows].float(),
            self.profile.temperature,
        )


@dataclass(frozen=True)
class TransformBasis:
    """Tables of a `transform` cache, ready for products.

    basis_SV: in logits per step. table_VS: in sixteenths of a step. predicted_VV: the logits that every input id
    predicts by itself, where the vocabulary is small enough to hold them all; then only coefficients are multiplied.
    """

    mean_V: Tensor
    basis_SV: Tensor
    table_VS: Tensor
    predicted_VV: Tensor | None

    @classmethod
    def of(cls, profile: TransformProfile, tables: Mapping[str, Tensor]) -> "TransformBasis":
        """From the stored tables."""
        basis_SV = tables["basis"].float() * (tables["basis_scale"][:, None] * profile.step)
        mean_V, table_VS = tables["mean"], tables["table"]
        predicted_VV = None
        if len(mean_V) <= _LARGEST_PREDICTED_VOCABULARY:
            predicted_VV = torch.addmm(mean_V, table_VS.float() / TABLE_UNITS_PER_STEP, basis_SV)
        return cls(mean_V, basis_SV, table_VS, predicted_VV)

    def logits(self, coefficients_NR: Tensor, input_ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        """mean + (table[input id] + coefficients) @ basis, (N, V) float32, the product computed in `dtype`."""
        rank = coefficients_NR.shape[1]
        if self.predicted_VV is not None:
            product_NV = coefficients_NR.to(dtype) @ self.basis_SV[:rank].to(dtype)
            return self.predicted_VV.index_select(0, input_ids_N).add_(product_NV)
        steps_NS = self.table_VS[input_ids_N].float() / TABLE_UNITS_PER_STEP
        steps_NS[:, :rank] += coefficients_NR.float()
        return (steps_NS.to(dtype) @ self.basis_SV.to(dtype)).float().add_(self.mean_V)


@dataclass(frozen=True)
class Transformed:
    """Of `transform`: approximate logits, then head and tail put right."""

    arrays: Arrays
    input_ids_N: Tensor
    profile: TransformProfile
    basis: TransformBasis

    def chunk(self, rows: Rows, dtype: torch.dtype = torch.float32) -> RescaledTarget:
        """The logits of some rows."""
        logits_NV = self.basis.logits(self.arrays["coefficients"][rows], self.input_ids_N[rows], dtype)
        return RescaledTarget.of(logits_NV, counted_head(self.arrays, rows, self.profile.temperatures))
