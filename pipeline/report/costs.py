"""The ledger: what the run's steps took, and from how many students on the cache pays."""

from collections.abc import Sequence
from typing import Literal

from tristill.pipeline.errors import StaleError
from tristill.pipeline.report.drawing import Line, bars, lines
from tristill.pipeline.report.run import Run
from tristill.pipeline.report.section import Block, Entry, Figure, Missing, Section, Table, Text
from tristill.pipeline.report.sweeps import read_sweeps
from tristill.pipeline.step import Step
from tristill.pipeline.steps import Distill, all_steps
from tristill.pipeline.sweep.results import Ledger, SweepResults
from tristill.pipeline.units import bytes_text, cell, seconds_text

_MOST_BARS = 12


def costs_section(run: Run) -> Section:
    """Time and memory of every step that left a record; then each sweep's ledger."""
    blocks: list[Block] = _steps(run)
    for place, (name, results) in enumerate(read_sweeps(run).items(), start=1):
        if isinstance(results, SweepResults) and results.ledger is not None:
            ledger = results.ledger
            if _has_given_teacher(run) and not ledger.is_teacher_given:  # of a sweep that did not know
                ledger = ledger.model_copy(update={"teacher_s": None, "is_teacher_given": True})
            blocks += _ledger(ledger, name, f"ledger-{place}")
        elif isinstance(results, SweepResults) and results.ledger_missing is not None:
            blocks.append(Missing(f"Sweep {name} has no ledger: {results.ledger_missing}."))
    if not blocks:
        blocks = [Missing("No step has left a record of what it took; run tristill run.")]
    return Section("ledger", "Ledger", blocks)


def _steps(run: Run) -> list[Block]:
    rows, times = [], []
    for step in _all(run):
        try:
            record = step.provenance()
        except StaleError:
            continue
        if record is None or record.elapsed_s is None:
            continue
        rows.append((step.label, seconds_text(record.elapsed_s), cell(record.peak_rss_mib, "{:,.0f}")))
        times.append((step.label.replace("distill --name ", ""), record.elapsed_s))
    if not rows:
        return []
    total = sum(elapsed_s for _, elapsed_s in times)
    shown = times[:_MOST_BARS]
    left_out = f" The plot shows the first {_MOST_BARS} steps." if times[_MOST_BARS:] else ""
    divisor, unit = (60.0, "minutes") if max(elapsed_s for _, elapsed_s in times) >= 120 else (1.0, "seconds")
    return [
        Text(
            f"All steps together took {seconds_text(total)}. {_paid_once(run)} paid once, whatever the number of "
            "students."
        ),
        Figure(
            "step-times",
            "Time of each step",
            bars(
                [label for label, _ in shown],
                [elapsed_s / divisor for _, elapsed_s in shown],
                [seconds_text(elapsed_s) for _, elapsed_s in shown],
                "step-times",
                unit,
                "s3",
            ),
            f"By the clock, with evaluation and saving; at least that, where a process was killed.{left_out}",
        ),
        Table(("step", "time", "peak RSS, MiB"), rows, title="Time and memory"),
    ]


def _has_given_teacher(run: Run) -> bool:
    return run.workspace.config.teacher.path is not None


def _paid_once(run: Run) -> str:
    return "The cache is" if _has_given_teacher(run) else "The teacher and the cache are"


def _all(run: Run) -> list[Step]:
    """The steps of the config, then students that were trained beside it."""
    steps = all_steps(run.workspace)
    known = {step.folder for step in steps}
    others = [student for student in run.students if student.folder not in known]
    return [*steps, *(Distill(run.workspace, student.name) for student in others)]


def _ledger(ledger: Ledger, name: str, key: str) -> list[Block]:
    """Cost over the number of students, from the cache and online; the teacher is paid either way."""
    mean_s, online_s = (total / max(1, ledger.num_students) for total in (ledger.students_s, ledger.online_total_s))
    median, least, most = ledger.online_over_cached
    rows = [
        ("teacher, paid either way", _teacher_text(ledger)),
        ("dump, once", f"{_least(ledger, 'dump_s')}{seconds_text(ledger.dump_s)}, {bytes_text(ledger.cache_bytes)}"),
        (f"{ledger.num_students} students", seconds_text(ledger.students_s)),
        ("step from the cache", f"{1e3 * ledger.cached_step_s:.3g} ms"),
        ("step online", f"{1e3 * ledger.online_step_s:.3g} ms"),
        ("online over cached", f"{median:.2f} ({least:.2f} to {most:.2f})"),
        ("the sweep, offline", seconds_text(ledger.offline_total_s)),
        ("the sweep, online", seconds_text(ledger.online_total_s)),
    ]
    pays = (
        "An online step is no dearer than a cached one here, so the cache saves no time."
        if ledger.break_even_students is None
        else f"The cache pays from {ledger.break_even_students:.1f} students on."
    )
    last = max(float(ledger.num_students), 2 * (ledger.break_even_students or 0.0), 2.0)
    return [
        Table(("what", "cost"), rows, "Measured on the machine of the sweep.", title=f"Ledger of {name}"),
        _break_even(ledger.dump_s, mean_s, online_s, last, key, pays),
    ]


def _teacher_text(ledger: Ledger) -> str:
    others = f"; {ledger.num_other_teachers} others of the ensemble not counted" if ledger.num_other_teachers else ""
    if ledger.teacher_s is None:
        return ("given, not trained here" if ledger.is_teacher_given else "not known") + others
    given = ", after a teacher that was given" if ledger.is_teacher_given else ""
    return f"{_least(ledger, 'teacher_s')}{seconds_text(ledger.teacher_s)}{given}{others}"


def _least(ledger: Ledger, what: Literal["teacher_s", "dump_s"]) -> str:
    return "at least " if what in ledger.at_least else ""


def _break_even(dump_s: float, cached_s: float, online_s: float, last: float, key: str, pays: str) -> Figure:
    students: Sequence[float] = [0.0, last]
    longest = max(dump_s + last * cached_s, last * online_s)
    divisor, unit = (3600.0, "hours") if longest >= 7200 else (60.0, "minutes") if longest >= 120 else (1.0, "seconds")
    found = [
        Line(Entry("from the cache", "s1"), students, [(dump_s + count * cached_s) / divisor for count in students]),
        Line(Entry("online", "s2", is_dashed=True), students, [count * online_s / divisor for count in students]),
    ]
    return Figure(
        key,
        "From how many students the cache pays",
        lines(found, key, "students of the sweep", unit),
        f"The dump and all students from it, beside as many students with the teacher forwarded at every step. {pays}",
        [line.entry for line in found],
    )
