"""Cached or online: where a student's targets come from."""

from dataclasses import dataclass
from pathlib import Path

import torch

from tristill.cache import CacheMismatchError, CacheMissingError, open_cache
from tristill.cache.profiles.head_needs import whole_distribution
from tristill.stages.distill.caches import open_caches
from tristill.stages.distill.config import DistillConfig
from tristill.stages.dump.config import DumpConfig
from tristill.stages.errors import TargetsError
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.description import CONFIG_NAME
from tristill.stages.progress import say
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.online import OnlineSource
from tristill.stages.targets.source import TargetSource


@dataclass(frozen=True)
class Places:
    """Where stage two may look, and which teacher and tokenizer it should find (None: any)."""

    cache: Path
    data: Path
    teacher: Path
    teacher_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None


def choose_source(
    config: DistillConfig, dump: DumpConfig, student_depth: int, places: Places, device: torch.device
) -> TargetSource:
    """The source that config.targets names; `auto` takes the cache if it serves the losses, else says why not.

    A mixture of several caches has no alternative: one teacher online is not the same.
    """
    if config.targets == "online":
        return online_source(config, dump, places, device)
    try:
        return cached_source(config, student_depth, places, device)
    except (CacheMissingError, TargetsError) as exc:
        if config.caches:
            raise
        if config.targets == "cached":
            raise type(exc)(f"{exc}, or forward the teacher at every step: --targets online") from exc
        say(f"targets: online, since the cache does not serve: {exc}")
        return online_source(config, dump, places, device)


def cached_source(config: DistillConfig, student_depth: int, places: Places, device: torch.device) -> CachedSource:
    """The cache, checked to be of the expected teacher and tokenizer and to hold what the losses need."""
    cache = open_cache(places.cache)
    for what, found, expected in (
        ("teacher", cache.spec.teacher_fingerprint, places.teacher_fingerprint),
        ("tokenizer", cache.spec.tokenizer_fingerprint, places.tokenizer_fingerprint),
    ):
        if expected not in (None, found):
            raise CacheMismatchError(
                f"{places.cache}: the cache was made by another {what}: found fingerprint {found}, expected {expected} "
                "of this run; point cache.dir at the cache of this run, or run `tristill dump-logits --force`"
            )
    if reasons := config.unserved_by(cache.spec, student_depth):
        raise TargetsError(
            f"{places.cache}: " + "; ".join(reasons) + "; change the student's losses, dump another cache"
        )
    return open_caches(cache, config, device)


def online_source(config: DistillConfig, dump: DumpConfig, places: Places, device: torch.device) -> OnlineSource:
    """The teacher, loaded and frozen unless it moves with the student, over the windows that a dump would hold."""
    data, teacher_folder = (places.data, "data.json", "tokenize"), (places.teacher, CONFIG_NAME, "teacher")
    for folder, name, command in (data,) if config.online is not None else (teacher_folder, data):
        if not (folder / name).is_file():
            raise TargetsError(
                f"{folder}: online targets need it, and {name} is not there; run `tristill {command}`, or dump a cache "
                "that serves the losses"
            )
    if dump.ensemble:
        raise TargetsError(
            f"cache.ensemble: found {len(dump.ensemble) + 1} teachers, of which online targets forward the run's own "
            "alone; dump a cache that serves the losses, or leave cache.ensemble out"
        )
    if config.tail is not None and config.needs_targets:
        raise TargetsError(f"distill.tail: {whole_distribution(config.tail, 'a teacher that is forwarded online')}")
    if config.curriculum is not None:
        raise TargetsError(
            "distill.curriculum: needs the teacher's entropies of all windows beforehand, which a cache holds; "
            "dump one, or leave the curriculum out"
        )
    teacher = load_model(places.teacher) if config.online is None else None
    return OnlineSource(
        places.data,
        device,
        teacher=teacher,
        temperature=dump.profile.temperature,
        max_train_windows=dump.max_train_windows,
        shard_positions=dump.shard_positions,
        hidden_stride=dump.hidden.stride,
        tokenizer_folder=None if teacher is None else places.teacher,
    )
