"""What a sweep's cache cost, and what it saved."""

import statistics
from collections.abc import Iterator
from typing import Literal

from tristill.cache import CacheError
from tristill.pipeline.cache_info import cache_info
from tristill.pipeline.errors import MissingInputError
from tristill.pipeline.provenance import read_provenance
from tristill.pipeline.results import read_summary
from tristill.pipeline.step import Step
from tristill.pipeline.steps import Distill, DumpLogits, teacher_step
from tristill.pipeline.sweep.results import Ledger
from tristill.pipeline.sweep.student import Base
from tristill.pipeline.tokenize_step import Tokenize
from tristill.pipeline.workspace import Workspace
from tristill.stages.distill.choose import Places, cached_source, online_source
from tristill.stages.distill.probe import probe_steps
from tristill.stages.errors import StageError
from tristill.stages.models.checkpoint import pick_device


def probe(base: Base) -> list[tuple[float, float]] | str:
    """Seconds of cached and online steps of the base's student; why not, where one of them is not to be had."""
    student = base.student({})
    config = student.config.distill
    workspace = student.workspace
    places = Places(
        cache=workspace.cache,
        data=Tokenize(workspace).folder,
        teacher=teacher_step(workspace).folder,
        teacher_fingerprint=DumpLogits(workspace).teacher_fingerprint(),
    )
    if config.caches:
        return "several caches are mixed, which one teacher online is not"
    device = pick_device(config.training.device)
    try:
        cached = cached_source(config, student.shape().layers, places, device)
        online = online_source(config, student.config.cache, places, device)
        return probe_steps(config, student.config.student, student.shape(), cached, online, device)
    except (StageError, CacheError) as exc:
        return str(exc)


def ledger(base: Base, steps: list[tuple[float, float]], trained: list[tuple[float, int]]) -> Ledger | str:
    """The ledger of students by (seconds, positions); why there is none, if it is not known what the dump took."""
    dump = read_provenance(base.workspace.cache)
    if dump is None or dump.elapsed_s is None:
        return f"{base.workspace.cache} does not say how long its dump took"
    training = base.student({}).config.distill.training
    context = int(cache_info(base.workspace.cache)["spec"]["context_length"])
    costs = {step.label: cost for step in _steps_of_teacher(base.workspace) if (cost := _cost(step)) is not None}
    found = balance(
        teacher_s=sum(seconds for seconds, _ in costs.values()) if costs else None,
        dump_s=dump.elapsed_s,
        cache_bytes=cache_info(base.workspace.cache)["file_bytes"],
        steps=steps,
        step_positions=training.batch_windows * context,
        trained=trained,
    )
    at_least = {"teacher_s": any(is_least for _, is_least in costs.values()), "dump_s": dump.is_resumed}
    return found.model_copy(
        update={
            "teacher_steps": tuple(costs),
            "is_teacher_given": base.workspace.config.teacher.path is not None,
            "num_other_teachers": len(base.student({}).config.cache.ensemble),
            "at_least": tuple(name for name, is_least in at_least.items() if is_least),
        }
    )


def _steps_of_teacher(workspace: Workspace) -> Iterator[Step]:
    """What made the teacher of a link, in order: in a chain every teacher, and the caches between them."""
    step = teacher_step(workspace)
    if isinstance(step, Distill):
        yield from _steps_of_teacher(step.workspace)
        yield DumpLogits(step.workspace)
    yield step


def _cost(step: Step) -> tuple[float, bool] | None:
    """Seconds of a step, and whether it took longer than that; None if it did not train, or does not say."""
    record = read_provenance(step.folder)
    if record is None or record.elapsed_s is None:
        return None
    if isinstance(step, DumpLogits):
        return record.elapsed_s, record.is_resumed
    try:
        train = read_summary(step.folder)["train"]
    except MissingInputError:
        return None
    return None if train is None else (float(train["elapsed_s"]), False)


def balance(
    *,
    teacher_s: float | None,
    dump_s: float,
    cache_bytes: int,
    steps: list[tuple[float, float]],
    step_positions: int,
    trained: list[tuple[float, int]],
) -> Ledger:
    """The arithmetic. steps: seconds cached and online, of step_positions each. trained: seconds and positions."""
    ratios = [online_s / cached_s for cached_s, online_s in steps]
    more_s = statistics.median(online_s - cached_s for cached_s, online_s in steps)
    students_s = sum(seconds for seconds, _ in trained)
    extra_s = more_s / step_positions * sum(positions for _, positions in trained)
    return Ledger(
        teacher_s=teacher_s,
        dump_s=dump_s,
        cache_bytes=cache_bytes,
        num_students=len(trained),
        students_s=students_s,
        cached_step_s=statistics.median(cached_s for cached_s, _ in steps),
        online_step_s=statistics.median(online_s for _, online_s in steps),
        online_over_cached=(statistics.median(ratios), min(ratios), max(ratios)),
        offline_total_s=dump_s + students_s,
        online_total_s=students_s + extra_s,
        break_even_students=dump_s * len(trained) / extra_s if extra_s > 0 else None,
    )


def ledger_text(found: Ledger) -> str:
    """In plain words."""
    median, least, most = found.online_over_cached
    students = f"{found.num_students} student{'s' * (found.num_students != 1)}"
    difference_s = found.online_total_s - found.offline_total_s
    pays = (
        "An online step is no dearer here, so that the cache pays at no number of students."
        if found.break_even_students is None
        else f"The cache pays from {found.break_even_students:.1f} students of this length on."
    )
    return (
        f"ledger: {_teacher_text(found)}. Its cache took {_least(found, 'dump_s')}{found.dump_s:,.0f} s to dump "
        f"and {found.cache_bytes / 1e6:,.1f} MB of disk; {students} took {found.students_s:,.0f} s "
        f"from it: {found.offline_total_s:,.0f} s in all.\nWith the teacher forwarded at every step, a step of the "
        f"base's student takes {median:.2f} times as long ({least:.2f} to {most:.2f}; "
        f"{1000 * found.cached_step_s:,.0f} and {1000 * found.online_step_s:,.0f} ms), and the same students "
        f"{found.online_total_s:,.0f} s: {abs(difference_s):,.0f} s {'more' if difference_s > 0 else 'less'}. {pays}"
    )


def _teacher_text(found: Ledger) -> str:
    """What the teacher took, and what of it is counted."""
    if found.teacher_s is None:
        text = "the teacher was given" if found.is_teacher_given else "the teacher took no time that is known"
    else:
        text = f"the teacher took {_least(found, 'teacher_s')}{found.teacher_s:,.0f} s to train"
        if len(found.teacher_steps) > 1 or found.is_teacher_given:
            text += f" ({', '.join(found.teacher_steps)}{'; the first one was given' * found.is_teacher_given})"
        text += ", which is paid either way"
    others = found.num_other_teachers
    return text + (f" (not counted: {others} more of its ensemble)" if others else "")


def _least(found: Ledger, name: Literal["teacher_s", "dump_s"]) -> str:
    return "at least " if name in found.at_least else ""
