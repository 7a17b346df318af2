"""Angle, length and divergence of cached targets against the full distribution.

The measure is that of Anshumann et al. 2025, Sparse Logit Sampling (arXiv 2503.16870), section 3: the gradient of the
distillation loss in the output matrix, from cached and from full targets.

Shapes: N positions, V vocabulary, D width of the student.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tristill.stages.losses.chunked_head import chunks
from tristill.stages.losses.forward_kl import ForwardKL
from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import FullTarget, Targets
from tristill.stages.models.language_model import LanguageModel

NOISE_SHARE = 0.15
_NOISE_SEED = 0


@dataclass(frozen=True)
class Fidelity:
    """At one temperature: angle and ratio of lengths of the mean gradients; KL(p || p cached), None if infinite."""

    angle_deg: float
    norm_ratio: float
    kl_nats: float | None


@dataclass(frozen=True)
class FeaturePairs:
    """Final hidden states of a student at some positions, and its output matrix."""

    final_ND: Tensor
    head_VD: Tensor


def near_student(teacher: LanguageModel) -> LanguageModel:
    """The teacher with noise of 15% of its deviation on every matrix: a good student, the hard case for a cache."""
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter.add_(NOISE_SHARE * parameter.std() * noise)
    return student


def gradient(student: FeaturePairs, targets: Targets, temperature: float, rows: slice | None = None) -> Tensor:
    """Gradient of the sum over positions of forward KL at `temperature` in the student's output matrix, (V, D)."""
    term = ForwardKL(temperature)
    every = range(len(student.final_ND))[rows or slice(None)]
    total_VD = torch.zeros_like(student.head_VD)
    for part in chunks(len(every), len(student.head_VD)):
        place = slice(every.start + part.start, every.start + part.stop)
        final_ND = student.final_ND[place]
        chunk = StudentChunk(final_ND @ student.head_VD.T, wants_gradient=True)
        term.per_position(chunk, torch.empty(0), targets.chunk(place))
        total_VD += chunk.gradient().T @ final_ND
    return total_VD


def compare(cached_VD: Tensor, full_VD: Tensor) -> tuple[float, float]:
    """(angle in degrees, ratio of lengths) of two gradients."""
    cached, full = cached_VD.double().flatten(), full_VD.double().flatten()
    cosine = float(cached @ full / (cached.norm() * full.norm()).clamp(min=1e-300))
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine)))), float(cached.norm() / full.norm().clamp(min=1e-300))


def mean_divergence(targets: Targets, full: Targets, temperature: float, num_positions: int) -> float | None:
    """Mean KL(p || p cached) at `temperature`; None if cached targets say nothing of single ids of the tail."""
    total = 0.0
    for part in _parts(num_positions):
        cached = targets.chunk(part)
        exact = full.chunk(part)
        assert isinstance(exact, FullTarget), "full targets know every id"
        if not isinstance(cached, FullTarget):
            return None
        log_p_NV = exact.log_probs(temperature)
        total += float((log_p_NV.exp() * (log_p_NV - cached.log_probs(temperature))).sum(dim=-1).double().sum())
    return total / num_positions if math.isfinite(total) else None


def fidelity(student: FeaturePairs, targets: Targets, full: Targets, full_VD: Tensor, temperature: float) -> Fidelity:
    """All three at one temperature; `full_VD` is the gradient from the full distribution."""
    angle_deg, norm_ratio = compare(gradient(student, targets, temperature), full_VD)
    return Fidelity(angle_deg, norm_ratio, mean_divergence(targets, full, temperature, len(student.final_ND)))


def full_gradients(student: FeaturePairs, full: Targets, temperatures: Sequence[float]) -> dict[float, Tensor]:
    """The gradients from the full distribution, by temperature."""
    return {temperature: gradient(student, full, temperature) for temperature in temperatures}


def _parts(num_positions: int) -> list[slice]:
    return [slice(first, min(first + 1024, num_positions)) for first in range(0, num_positions, 1024)]
