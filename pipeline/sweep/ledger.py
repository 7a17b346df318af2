"""What a sweep's cache cost, and what it saved."""

import statistics

from cache import CacheError
from pipeline.cache_info import cache_info
from pipeline.provenance import read_provenance
from pipeline.steps import DumpLogits, Tokenize, teacher_step
from pipeline.sweep.results import Ledger
from pipeline.sweep.student import Base
from stages.distill.choose import Places, cached_source, online_source
from stages.distill.probe import probe_steps
from stages.errors import StageError
from stages.models.folder import pick_device


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
    teacher, dump = read_provenance(base.workspace.teacher), read_provenance(base.workspace.cache)
    if dump is None or dump.elapsed_s is None:
        return f"{base.workspace.cache} does not say how long its dump took"
    training = base.student({}).config.distill.training
    context = int(cache_info(base.workspace.cache)["spec"]["context_length"])
    return balance(
        teacher_s=teacher.elapsed_s if teacher else None,
        dump_s=dump.elapsed_s,
        cache_bytes=cache_info(base.workspace.cache)["file_bytes"],
        steps=steps,
        step_positions=training.batch_windows * context,
        trained=trained,
    )


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
    teacher = f"{found.teacher_s:,.0f} s to train" if found.teacher_s is not None else "no time that is known"
    students = f"{found.num_students} student{'s' * (found.num_students != 1)}"
    difference_s = found.online_total_s - found.offline_total_s
    pays = (
        "An online step is no dearer here, so that the cache pays at no number of students."
        if found.break_even_students is None
        else f"The cache pays from {found.break_even_students:.1f} students of this length on."
    )
    return (
        f"ledger: the teacher took {teacher}, which is paid either way. Its cache took {found.dump_s:,.0f} s to dump "
        f"and {found.cache_bytes / 1e6:,.1f} MB of disk; {students} took {found.students_s:,.0f} s "
        f"from it: {found.offline_total_s:,.0f} s in all.\nWith the teacher forwarded at every step, a step of the "
        f"base's student takes {median:.2f} times as long ({least:.2f} to {most:.2f}; "
        f"{1000 * found.cached_step_s:,.0f} and {1000 * found.online_step_s:,.0f} ms), and the same students "
        f"{found.online_total_s:,.0f} s: {abs(difference_s):,.0f} s {'more' if difference_s > 0 else 'less'}. {pays}"
    )
