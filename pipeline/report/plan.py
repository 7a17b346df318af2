"""What was predicted of the run, beside what happened."""

from collections.abc import Sequence

from tristill.cache import CacheError
from tristill.pipeline.errors import PipelineError
from tristill.pipeline.plan.compare import Comparison, compare
from tristill.pipeline.plan.prediction import PLAN_NAME
from tristill.pipeline.report.drawing import COLORS, Axes, drawn, plain, scale_axes
from tristill.pipeline.report.run import Run
from tristill.pipeline.report.section import Block, Figure, Missing, Section, Table, Text
from tristill.pipeline.units import bytes_text, seconds_text, tick_text
from tristill.stages.errors import StageError

_WITHIN = {"bytes": 0.1, "s": 0.25}
_MOST_DOTS = 24


def plan_section(run: Run) -> Section:
    """Predictions of `tristill plan`."""
    title = "Plan against what happened"
    if not (run.workspace.run_dir / PLAN_NAME).is_file():
        text = "Nothing was predicted of this run; tristill plan does, before or after."
        return Section("plan", title, [Missing(text)])
    try:
        found = compare(run.workspace)
    except (PipelineError, CacheError, StageError) as exc:
        return Section("plan", title, [Missing(str(exc))])
    if not found:
        return Section("plan", title, [Missing("The plan is there, but no step of it has happened yet.")])
    blocks: list[Block] = [Text(_story(found))]
    rated = [one for one in found if one.predicted > 0 and one.happened > 0]
    if rated:
        blocks.append(_ratios(rated[:_MOST_DOTS]))
    rows = [
        (_what(one), _text(one.predicted, one.unit), _text(one.happened, one.unit),
         f"{one.ratio:.2f}" if one.predicted else "-")
        for one in found
    ]  # fmt: skip
    blocks.append(Table(("what", "predicted", "happened", "ratio"), rows, title="Predicted and happened"))
    return Section("plan", title, blocks)


def _story(found: Sequence[Comparison]) -> str:
    bound = [(one, within) for one in found if (within := _WITHIN.get(one.unit)) is not None and one.predicted]
    kept = sum(abs(one.ratio - 1) <= within for one, within in bound)
    return (
        f"Of {len(bound)} predictions of bytes and times {kept} came within 10% and 25%: a ratio above 1 took more "
        "than was predicted."
    )


def _ratios(found: Sequence[Comparison]) -> Figure:
    def plot(axes: Axes) -> None:
        axes.axvspan(0.75, 1.25, color=COLORS["s3"], alpha=0.12, linewidth=0)
        axes.axvline(1, color=COLORS["ink"], linewidth=1)
        places = range(len(found))
        for place, one in zip(places, found, strict=True):
            axes.plot([1, one.ratio], [place, place], color=COLORS["muted"], linewidth=1)
            axes.plot([one.ratio], [place], marker="o", markersize=7, color=COLORS["s1"])
        ratios = [one.ratio for one in found]
        axes.set_xlim(min(0.6, 0.9 * min(ratios)), max(1.6, 1.1 * max(ratios)))
        scale_axes(axes, log_x=max(ratios) > 4 or min(ratios) < 0.25)
        axes.set_yticks(places, [plain(_what(one), 30) for one in found])
        axes.invert_yaxis()
        axes.margins(y=0.5 / len(found))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("happened over predicted")

    return Figure(
        "plan-ratios",
        "How the predictions held",
        drawn(plot, "plan-ratios", height=80 + 22 * len(found)),
        "Each dot is a figure of the plan; on the line it was exact, within the band off by at most a quarter.",
    )


def _text(value: float, unit: str) -> str:
    if unit == "bytes":
        return bytes_text(value)
    if unit == "s":
        return seconds_text(value)
    return f"{value:,.0f}" if unit == "positions" else f"{tick_text(value)} {unit}"


def _what(one: Comparison) -> str:
    """A student by its name alone."""
    return one.what.removeprefix("distill --name ")
