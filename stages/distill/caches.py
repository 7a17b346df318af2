"""The run's own cache, alone or with others mixed in."""

from collections.abc import Iterator

import torch

from tristill.cache import Cache, CacheMismatchError, CacheSpec, Need, open_cache
from tristill.cache.spec import differences
from tristill.stages.distill.config import DistillConfig
from tristill.stages.errors import TargetsError
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.mixed import MixedSource, kind_of_targets

_OF_THE_WINDOWS = (
    "vocab_size", "end_of_text_id", "bos_id", "context_length", "splits", "windows_per_chunk", "tokenizer_fingerprint"
)  # fmt: skip
"""Fields of a spec that say which windows there are, and in which order they come."""


def open_caches(cache: Cache, config: DistillConfig, device: torch.device) -> CachedSource:
    """A source over the run's own cache and those of config.caches.

    Raises CacheMismatchError for other windows, TargetsError for targets that do not serve or cannot be mixed.
    """
    if not config.caches:
        return CachedSource(cache, device)
    others = [open_cache(further.dir) for further in config.caches]
    for other in others:
        same = {name: getattr(cache.spec, name) for name in _OF_THE_WINDOWS}
        if differing := differences(other.spec, other.spec.model_copy(update=same)):
            raise CacheMismatchError(
                f"distill.caches: {other.folder}: is over other windows than the run's own cache {cache.folder}: "
                f"{differing}; dump both from the same data with the same cache.max_train_windows"
            )
    problems = [problem for one in (cache, *others) for problem in _unmixable(one, cache.spec, config)]
    if problems:
        raise TargetsError("distill.caches: " + "; ".join(problems))
    return MixedSource(cache, others, config.shares, config.tail, device)


def _unmixable(cache: Cache, own: CacheSpec, config: DistillConfig) -> Iterator[str]:
    """Why a cache does not serve what the losses, and the evaluation, ask of the mixture."""
    temperature = own.profile.temperature
    needs = (*config.needs(temperature), Need("forward_kl", temperature, None, config.tail))
    yield from (f"{cache.folder}: {reason}" for reason in cache.spec.unserved(needs))
    expected, found = (kind_of_targets(spec.profile, config.tail, spec.vocab_size) for spec in (own, cache.spec))
    if found == "head":
        yield (
            f"{cache.folder}: its targets are heads of profile {cache.spec.profile.kind}, and two caches have "
            "different ones, of which no mixture is known; set distill.tail = 'uniform', use profile transform, dense "
            "or sampled, or mix the teachers when the cache is dumped (cache.ensemble)"
        )
    elif expected not in {"head", found}:
        yield (
            f"{cache.folder}: found {_named(found)}, but the run's own cache holds {_named(expected)}, which are not "
            "mixed with each other; dump both with one profile"
        )


def _named(kind: str) -> str:
    return "draws" if kind == "draws" else "whole distributions"
