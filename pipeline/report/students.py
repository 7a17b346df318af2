"""How the students learned: every term of the loss, and what it pulled."""

from collections.abc import Sequence

from tristill.pipeline.provenance import flat
from tristill.pipeline.report.drawing import (
    COLORS,
    Axes,
    Line,
    drawn,
    entries_of,
    lines,
    over_positions,
    positions_label,
    scale_axes,
    shares_on,
    thinned,
)
from tristill.pipeline.report.run import Model, Run, mapping
from tristill.pipeline.report.section import Block, Figure, Missing, Section, Table, Text
from tristill.pipeline.report.settings_scale import setting_text
from tristill.pipeline.units import cell, number, seconds_text

_MOST_TERMS = 6
_MOST_SHARES = 4
_MOST_SETTINGS = 6
_VARYING = ("student", "distill")
_SHOWN_ALREADY = ("distill.alpha", "distill.losses", "distill.targets", "distill.training.steps")


def students_section(run: Run) -> Section:
    """One figure a term, students overlaid; then what each term's gradient weighed."""
    if not run.students:
        return Section("students", "Students", [Missing("There are no students yet; run tristill distill.")])
    blocks: list[Block] = [Text(_story(run)), _table(run)]
    terms = list(dict.fromkeys(term for student in run.shown for term in student.names_in_log("terms")))
    blocks += [_term(run.shown, term, f"term-{place}") for place, term in enumerate(terms[:_MOST_TERMS], start=1)]
    if terms[_MOST_TERMS:]:
        blocks.append(Text(f"Terms that are not drawn: {', '.join(terms[_MOST_TERMS:])}."))
    if looked := [student for student in run.shown if student.held_out[0]]:
        blocks.append(_held_out(looked))
    mixed = [student for student in run.shown if len(_share_names(student)) > 1]
    blocks += [_shares(student, f"gradient-{place}") for place, student in enumerate(mixed[:_MOST_SHARES], start=1)]
    return Section("students", "Students", blocks)


def _story(run: Run) -> str:
    online = [student.name for student in run.students if student.summary.get("targets") == "online"]
    unfinished = [student.name for student in run.students if not student.is_finished]
    source = "with the teacher forwarded online" if len(online) == len(run.students) else "from the cache"
    parts = [f"{len(run.students)} student{'' if len(run.students) == 1 else 's'}, trained {source}."]
    if online and len(online) < len(run.students):
        parts.append(f"With the teacher forwarded online: {', '.join(online)}.")
    if unfinished:
        parts.append(f"Not finished: {', '.join(unfinished)}; run the same tristill distill again to go on.")
    if run.left_out:
        parts.append(run.left_out)
    return " ".join(parts)


def _table(run: Run) -> Table:
    differing = _differing(run.students)
    shown, left_out = list(differing)[:_MOST_SETTINGS], list(differing)[_MOST_SETTINGS:]
    rows = [
        (
            student.name,
            student.taught_by or "-",
            student.loss,
            str(student.summary.get("targets", "-")),
            *(differing[key][place] for key in shown),
            cell(student.train.get("steps"), "{:,.0f}"),
            cell(student.train.get("positions"), "{:,.0f}"),
            seconds_text(elapsed_s) if (elapsed_s := number(student.train.get("elapsed_s"))) is not None else "-",
            cell(student.train.get("positions_per_s"), "{:,.0f}"),
            cell(student.train.get("peak_rss_mib"), "{:,.0f}"),
        )
        for place, student in enumerate(run.students)
    ]
    header = (
        "student", "taught by", "alpha or terms", "targets", *(key.partition(".")[2] for key in shown), "steps",
        "positions", "time", "positions/s", "peak RSS, MiB",
    )  # fmt: skip
    caption = "How each was trained; settings that differ have columns of their own."
    if left_out:
        caption += f" These differ too: {', '.join(left_out)}."
    return Table(header, rows, caption, num_left=4 + len(shown))


def _held_out(students: Sequence[Model]) -> Figure:
    """Loss of a sample of held-out text over the training."""
    largest = max(at for student in students for at in student.held_out[0])
    found = []
    for student in students:
        at, losses = student.held_out
        found.append(Line(student.entry, over_positions(at, largest), losses, has_markers=True))
    return Figure(
        "students-held-out",
        "Held-out loss while training",
        lines(found, "students-held-out", positions_label(largest), "loss, nats per position"),
        "Cross-entropy on a sample of held-out text, the same at every point; lower is better."
        + "".join(student.parting for student in students),
        [line.entry for line in found],
    )


def _differing(students: Sequence[Model]) -> dict[str, list[str]]:
    """Settings that are not the same of all students whose records are known, by their keys, a cell a student."""
    known = [flat({part: mapping(student.record.settings.get(part)) for part in _VARYING}) if student.record else {}
             for student in students]  # fmt: skip
    keys = [key for found in known for key in found if not key.startswith(_SHOWN_ALREADY)]
    cells = {key: [setting_text(found.get(key)) for found in known] for key in sorted(set(keys))}
    return {key: texts for key, texts in cells.items() if len(set(texts)) > 1}


def _term(students: Sequence[Model], term: str, key: str) -> Figure:
    curves = [(student, *student.curve("terms", term)) for student in students]
    known = [(student, positions, values) for student, positions, values in curves if positions]
    largest = max((max(positions) for _, positions, _ in known), default=1.0)
    found = [
        Line(student.entry, over_positions(positions, largest), values) for student, positions, values in known
    ]  # fmt: skip
    last = ", ".join(f"{student.name} {values[-1]:.3f}" for student, _, values in known)
    return Figure(
        key,
        f"Loss term {term}",
        lines(found, key, positions_label(largest), "nats per position"),
        f"The term itself, before its weight, means over the steps since the last record; lower is better. At the end: "
        f"{last}.",
        [line.entry for line in found],
    )


def _share_names(student: Model) -> list[str]:
    return [name for name in student.names_in_log("gradient_share") if student.curve("gradient_share", name)[0]]


def _shares(student: Model, key: str) -> Figure:
    """Shares stacked to one."""
    names = _share_names(student)
    curves = [student.curve("gradient_share", name) for name in names]
    positions = curves[0][0]
    by_position = [dict(zip(*curve, strict=True)) for curve in curves]
    stacked = [[found.get(at, 0.0) for at in positions] for found in by_position]
    entries = entries_of(names)
    largest = max(positions)

    def plot(axes: Axes) -> None:
        at = thinned(len(positions))
        x = over_positions([positions[i] for i in at], largest)
        layers = [[share[i] for i in at] for share in stacked]
        colors = [COLORS[entry.color] for entry in entries]
        axes.stackplot(x, *layers, colors=colors, alpha=0.75)
        axes.set_ylim(0, 1)
        axes.margins(x=0)
        axes.set_xlabel(positions_label(largest))
        axes.set_ylabel("share of the gradient")
        scale_axes(axes)
        shares_on(axes.yaxis)

    last = ", ".join(f"{name} {share[-1]:.0%}" for name, share in zip(names, stacked, strict=True))
    return Figure(
        key,
        f"What pulls {student.name}",
        drawn(plot, key, height=220),
        "Each term's share of the summed lengths of all terms' gradients, after its weight: a term of a small share "
        f"teaches little, whatever its weight. At the end: {last}.",
        [type(entry)(entry.label, entry.color) for entry in entries],
    )
