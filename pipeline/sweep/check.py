"""What can be known to be wrong with a sweep before any of its students is trained."""

import shlex
from collections.abc import Iterator

from tristill.cache import CacheSpec
from tristill.cache.manifest import load_manifest
from tristill.pipeline.config import VARIANT_SECTIONS, refuse
from tristill.pipeline.errors import ConfigError, MissingInputError
from tristill.pipeline.runner import refuse_if_stale
from tristill.pipeline.steps import DumpLogits
from tristill.pipeline.sweep.config import SEED, Grid, Range, SweepConfig
from tristill.pipeline.sweep.points import Point, examples, grid, in_words, with_seeds
from tristill.pipeline.sweep.student import Base
from tristill.stages.models.description import CONFIG_NAME, HuggingFaceShape

_OF_WHOLE_DISTRIBUTIONS = {"top1_agreement", "acceptance_rate"}


def check_settings(sweep: SweepConfig, base: Base) -> None:
    """Raise ConfigError with every problem of the sweep and its points that is there whatever the cache holds."""
    refuse(base.sweep_path, list(_problems_of_keys(sweep, base)))  # nothing can be tried with keys that are wrong
    refuse(base.sweep_path, _problems_of_points(sweep, base, None))


def check_sweep(sweep: SweepConfig, base: Base) -> None:
    """Raise ConfigError with every problem of the sweep and its points, MissingInputError without a finished cache."""
    try:
        spec = _cache(base)
    except MissingInputError:
        check_settings(sweep, base)
        raise
    refuse(base.sweep_path, list(_problems_of_keys(sweep, base)))
    refuse(base.sweep_path, [*_problems_of_metric(sweep, spec), *_problems_of_points(sweep, base, spec)])


def _cache(base: Base) -> CacheSpec:
    dump = DumpLogits(base.workspace)
    refuse_if_stale(dump)
    if not dump.is_complete():
        raise MissingInputError(
            f"the sweep needs the cache {dump.folder}, which is missing or unfinished; run `tristill run --until "
            f"dump-logits {shlex.join(base.arguments)}` first, or add --make-cache"
        )
    return load_manifest(dump.folder).spec


def _problems_of_keys(sweep: SweepConfig, base: Base) -> Iterator[str]:
    for key, varied in sweep.vary.items():
        if key.split(".")[0] not in VARIANT_SECTIONS:
            yield f"vary.{key}: expected a key of {', '.join(sorted(VARIANT_SECTIONS))}, since students share one cache"
        elif key == "distill.targets":
            yield f"vary.{key}: a sweep reads its cache, so that all have targets = 'cached'"
        elif key == SEED and sweep.seeds:
            yield f"vary.{key}: is varied by seeds already; leave one of them out"
        elif key.startswith("student.model.") and isinstance(
            shape := base.workspace.config.student_shape, HuggingFaceShape
        ):
            yield (
                f"vary.{key}: the base's student has a shape of transformers ({shape.kind}), which has no such key; "
                "to vary keys of it, give a whole student.model, a shape of our own transformer, in the base"
            )
        if isinstance(sweep.search, Grid) and isinstance(varied, Range) and varied.values() is None:
            yield f"vary.{key}: found a range without a step, which has no end of values; a grid needs step, or a list"
    if base.workspace.config.distill.online is not None:
        yield "distill.online: a teacher that moves with its student is no cache; leave it out of what is swept"


def _problems_of_metric(sweep: SweepConfig, spec: CacheSpec) -> Iterator[str]:
    if spec.profile.kind == "sampled" and sweep.metric_name in _OF_WHOLE_DISTRIBUTIONS:
        yield (
            f"metric: {sweep.metric} is not known from a cache of profile sampled, which holds draws; "
            "use validation.perplexity or validation.kl_to_teacher_nats"
        )


def _problems_of_points(sweep: SweepConfig, base: Base, spec: CacheSpec | None) -> list[str]:
    """Every problem once, with the first point that has it."""
    found: dict[str, Point] = {}
    points = list(grid(sweep) if isinstance(sweep.search, Grid) else examples(sweep))
    for point in points:
        for problem in _problems_of_point(sweep, base, spec, with_seeds(point, sweep)[0]):
            found.setdefault(problem, point)
    if len(points) == 1:
        return list(found)
    return [f"{problem} (with {in_words(point)})" for problem, point in found.items()]


def _problems_of_point(sweep: SweepConfig, base: Base, spec: CacheSpec | None, parameters: Point) -> Iterator[str]:
    try:
        problems = base.problems(parameters)
    except ConfigError as exc:  # a key in what is no table
        problems = [str(exc)]
    if problems:
        yield from problems
        return
    student = base.student(parameters)
    steps = student.config.distill.training.steps
    if sweep.pruning is not None and sweep.pruning.every >= steps:
        yield f"pruning.every: found {sweep.pruning.every}, expected fewer than the {steps} steps of a student"
    if spec is not None:
        if student.config.student.init == "teacher" and not (base.workspace.teacher / CONFIG_NAME).is_file():
            yield f"student.init: 'teacher' needs the folder {base.workspace.teacher}, which is not there"
        unserved = student.config.distill.unserved_by(spec, student.shape().layers)
        yield from (f"distill: {base.workspace.cache} does not serve it: {reason}" for reason in unserved)
