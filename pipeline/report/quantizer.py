"""What became of the trits while the students trained."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tristill.pipeline.report.drawing import Line, entries_of, lines, over_positions, positions_label
from tristill.pipeline.report.run import Model, Run, mapping
from tristill.pipeline.report.section import Block, Figure, Missing, Section, Text
from tristill.pipeline.units import number

_BLOCK = re.compile(r"\.(?P<block>\d+)\.(?:.*\.)?(?P<matrix>[^.]+)$")
_MOST_MATRICES = 8
_MOST_BANDS = 3


@dataclass(frozen=True)
class _Sign:
    """What is logged of each layer under `key`, and how to read it."""

    key: str
    title: str
    y_label: str
    caption: str
    is_share: bool = False


_SIGNS = (
    _Sign(
        "zeros",
        "Zero trits",
        "share of zeros",
        "The share of ternary weights that are 0. Near 100% a layer is dead; absmean starts near 31%.",
        is_share=True,
    ),
    _Sign(
        "flips",
        "Flipping trits",
        "share flipped since the last log",
        "The share of trits that differ from those at the last log. It falls as the learning rate does; 0 early on is "
        "a frozen layer.",
        is_share=True,
    ),
    _Sign(
        "to_boundary",
        "Distance to the boundary",
        "distance, in scales",
        "How far latent weights are, on average, from the magnitude at which their trit changes, in units of the "
        "scale. The nearer, the easier a weight flips.",
    ),
    _Sign(
        "scale",
        "Scale",
        "scale gamma",
        "The factor of the trits, a mean over each layer's. It grows and shrinks with the latent weights.",
    ),
)


def quantizer_section(run: Run) -> Section | None:
    """Health of the ternary layers; None if there is no student."""
    if not run.students:
        return None
    known = [student for student in run.shown if student.names_in_log("zeros")]
    if not known:
        text = "No student has logged the health of its ternary layers: their codes are not ternary, or they are older."
        return Section("quantizer", "Quantiser health", [Missing(text)])
    bands = ", bands go from its lowest to its highest layer" if len(known) <= _MOST_BANDS else ""
    blocks: list[Block] = [
        Text(f"Lines are means over all ternary layers of a student{bands}; training logs them every few steps.")
    ]
    blocks += [_over_time(known, sign) for sign in _SIGNS]
    blocks += [figure for sign in _SIGNS[:2] if (figure := _by_depth(known[0], sign))]
    return Section("quantizer", "Quantiser health", blocks)


def _over_time(students: Sequence[Model], sign: _Sign) -> Figure:
    found, last = [], []
    largest = max(number(record.get("positions")) or 1.0 for student in students for record in student.log)
    for student in students:
        at, low, mean, high = _spread(student, sign.key)
        if at:
            band = (low, high) if len(students) <= _MOST_BANDS else None
            found.append(Line(student.entry, over_positions(at, largest), mean, band))
            last.append(f"{student.name} {100 * mean[-1]:.3g}%" if sign.is_share else f"{student.name} {mean[-1]:.3g}")
    key = f"trits-{sign.key.replace('_', '-')}"
    return Figure(
        key,
        sign.title,
        lines(found, key, positions_label(largest), sign.y_label, has_shares=sign.is_share),
        f"{sign.caption} At the end: {', '.join(last)}.",
        [line.entry for line in found],
    )


def _spread(student: Model, key: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """(positions, lowest, mean and highest over layers), record by record."""
    rows = []
    for record in student.log:
        at = number(record.get("positions"))
        values = [value for found in mapping(record.get(key)).values() if (value := number(found)) is not None]
        if at is not None and values:
            rows.append((at, min(values), sum(values) / len(values), max(values)))
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    return columns[0], columns[1], columns[2], columns[3]


def _by_depth(student: Model, sign: _Sign) -> Figure | None:
    """A share at the end by block, a line for each matrix of a block."""
    last = next(mapping(record[sign.key]) for record in reversed(student.log) if mapping(record.get(sign.key)))
    shares = {name: share for name, value in last.items() if (share := number(value)) is not None}
    by_matrix: dict[str, list[tuple[float, float]]] = {}
    for name, share in shares.items():
        if place := _BLOCK.search(name):
            by_matrix.setdefault(place["matrix"], []).append((float(place["block"]), share))
    if not by_matrix:
        return None
    found = []
    for entry in entries_of(list(by_matrix)[:_MOST_MATRICES]):
        points = sorted(by_matrix[entry.label])
        found.append(Line(entry, [at for at, _ in points], [share for _, share in points], has_markers=True))
    lowest, highest = (pick(shares, key=lambda name: shares[name]) for pick in (min, max))
    key = f"depth-{sign.key}"
    return Figure(
        key,
        f"{sign.title} of {student.name}, by depth",
        lines(found, key, "block of the transformer", sign.y_label, has_shares=True, has_whole_x=True),
        f"At the end of its training, a line for each matrix of a block. Least: {lowest}, {shares[lowest]:.2%}; most: "
        f"{highest}, {shares[highest]:.2%}.",
        [line.entry for line in found],
    )
