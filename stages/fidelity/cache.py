"""How well a finished cache teaches, measured against its own teacher on the validation split."""

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from tristill.cache import CacheMismatchError, Need, open_cache
from tristill.stages.errors import TargetsError
from tristill.stages.fidelity.measure import FeaturePairs, compare, gradient, mean_divergence, near_student
from tristill.stages.losses.target import ComputedTargets
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.description import CONFIG_NAME
from tristill.stages.models.language_model import finite_features
from tristill.stages.models.origin import model_fingerprint
from tristill.stages.progress import Progress
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.source import Epoch, Signals

_BATCH_WINDOWS = 16


class CacheFidelity(BaseModel):
    """At one temperature, over `positions` of the validation split; numbers are None where the cache refuses to serve.

    angle_deg and norm_ratio: of the gradient of forward KL in the student's output matrix, cached beside full. kl_nats:
    mean KL(p || p cached), None too if the cache says nothing of single ids of the tail.
    """

    model_config = ConfigDict(frozen=True)

    temperature: float
    positions: int
    angle_deg: float | None
    norm_ratio: float | None
    kl_nats: float | None
    refused: str | None


@torch.no_grad()
def cache_fidelity(
    cache_folder: Path,
    teacher_folder: Path,
    student_folder: Path | None,
    temperatures: Sequence[float],
    max_positions: int,
) -> list[CacheFidelity]:
    """One row per temperature; without a student, the teacher with noise on its weights takes its place."""
    cache = open_cache(cache_folder)
    if not (teacher_folder / CONFIG_NAME).is_file():
        raise TargetsError(f"{teacher_folder}: no teacher to compare the cache with; run `tristill teacher`")
    if (found := model_fingerprint(teacher_folder)) != cache.spec.teacher_fingerprint:
        raise CacheMismatchError(
            f"{cache_folder}: was made by another teacher: {teacher_folder} has fingerprint {found}, expected "
            f"{cache.spec.teacher_fingerprint}; give the run that made this cache with --run-dir (one of several "
            "teachers, cache.ensemble, is not measured)"
        )
    teacher = load_model(teacher_folder).eval()
    student = load_model(student_folder).eval() if student_folder else near_student(teacher)
    if student.vocab_size != teacher.vocab_size:
        raise TargetsError(
            f"{student_folder}: found a vocabulary of {student.vocab_size}, expected the teacher's {teacher.vocab_size}"
        )
    refusals = {
        tau: cache.spec.profile.unserved(Need("forward_kl", tau), cache.spec.vocab_size) for tau in temperatures
    }
    served = [tau for tau, reason in refusals.items() if reason is None]
    gradients = {tau: torch.zeros(2, *student.head_weight.shape) for tau in served}
    divergences: dict[float, float | None] = dict.fromkeys(served, 0.0)
    positions = 0
    source = CachedSource(cache, torch.device("cpu"))
    total = min(max_positions, cache.spec.num_positions("validation"))
    with Progress("fidelity", total, "positions") as progress:
        for batch in source.batches("validation", _BATCH_WINDOWS, Signals(targets=True), Epoch()):
            if positions >= max_positions:
                break
            assert batch.targets is not None, "targets were asked for"
            final_ND = batch.counted(finite_features(teacher, batch.input_ids_BT).final_BTD)
            if not len(final_ND):
                continue
            full = ComputedTargets(final_ND, teacher.head_weight, teacher.softcap)
            seen = finite_features(student, batch.input_ids_BT, whose="the student")
            pair = FeaturePairs(batch.counted(seen.final_BTD), student.head_weight)
            for tau in served:
                gradients[tau][0] += gradient(pair, batch.targets, tau)
                gradients[tau][1] += gradient(pair, full, tau)
                mean, before = mean_divergence(batch.targets, full, tau, len(final_ND)), divergences[tau]
                divergences[tau] = None if mean is None or before is None else before + mean * len(final_ND)
            positions += len(final_ND)
            progress.advance(len(final_ND))
    rows = []
    for tau, refused in refusals.items():
        angle_deg = norm_ratio = kl_nats = None
        if refused is None:
            angle_deg, norm_ratio = compare(*gradients[tau])
            kl_sum = divergences[tau]
            kl_nats = None if kl_sum is None else kl_sum / positions
        rows.append(
            CacheFidelity(
                temperature=tau,
                positions=positions,
                angle_deg=angle_deg,
                norm_ratio=norm_ratio,
                kl_nats=kl_nats,
                refused=refused,
            )
        )
    return rows
