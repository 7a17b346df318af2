"""What each sweep found: every student as a line over the settings, and the frontier of perplexity against bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from tristill.cache.regular_file import read_file
from tristill.pipeline.report.drawing import COLORS, WIDE, Axes, drawn, numbers_on, plain, scale_axes
from tristill.pipeline.report.run import Run, mapping
from tristill.pipeline.report.section import Block, Entry, Figure, Heading, Missing, Section, Table, Text
from tristill.pipeline.report.settings_scale import Scale, setting_text
from tristill.pipeline.sweep.points import in_words, short_keys
from tristill.pipeline.sweep.results import SweepResults, Trial
from tristill.pipeline.units import bytes_text, cell, number

RESULTS_NAME = "results.json"
_MOST_AXES = 7
_MOST_ROWS = 15
_MOST_SCATTERS = 4
_BEST = Entry("best", "s2")
_GOOD = Entry("best quarter", "s1")
_OTHER = Entry("others", "muted")


@dataclass(frozen=True)
class Scored:
    """A finished trial, its metric, and how it is drawn."""

    trial: Trial
    value: float
    entry: Entry


def sweeps_section(run: Run) -> Section | None:
    """Every sweep of the run; None if there is none."""
    found = read_sweeps(run)
    if not found:
        return None
    blocks: list[Block] = []
    for place, (name, results) in enumerate(found.items(), start=1):
        blocks += [Heading(name)] if len(found) > 1 else []
        blocks += [Missing(results)] if isinstance(results, str) else _of_sweep(results, f"sweep-{place}")
    return Section("sweeps", "Sweeps" if len(found) > 1 else "Sweep", blocks)


def read_sweeps(run: Run) -> dict[str, SweepResults | str]:
    """Results by the sweep's name, or why they cannot be read."""
    found: dict[str, SweepResults | str] = {}
    for path in sorted((run.workspace.run_dir / "sweeps").glob(f"*/{RESULTS_NAME}")):
        try:
            found[path.parent.name] = SweepResults.model_validate_json(read_file(path))
        except (OSError, ValidationError) as exc:
            reason = str(exc).splitlines()[0]
            found[path.parent.name] = f"Sweep {path.parent.name}: {RESULTS_NAME} cannot be read ({reason})."
    return found


def _of_sweep(results: SweepResults, key: str) -> list[Block]:
    scored = scored_of(results)
    blocks: list[Block] = [Text(_story(results, scored))]
    if not scored:
        return blocks
    blocks.append(_table(results, scored))
    names = list(results.varied)
    if len(scored) > 1 and names:
        blocks.append(_parallel(names[:_MOST_AXES], results.metric, scored, f"{key}-parallel"))
    blocks += _frontier(scored, f"{key}-frontier")
    if groups := [group for group in results.groups if (group.num_seeds or len(group.trials)) > 1]:
        rows = [
            (in_words(group.parameters) or "no setting", group.seeds_text, f"{group.mean:.4g}",
             cell(group.deviation, "{:.2g}"))
            for group in groups
        ]  # fmt: skip
        caption = "Students that differ in their seed only: mean and standard deviation of a sample."
        blocks.append(Table(("settings", "seeds", f"mean {results.metric}", "deviation"), rows, caption, title="Seeds"))
    if len(scored) > 1:
        blocks += [_scatter(name, results.metric, scored, f"{key}-{place}")
                   for place, name in enumerate(names[:_MOST_SCATTERS])]  # fmt: skip
    return blocks


def scored_of(results: SweepResults) -> list[Scored]:
    """Finished trials, from the best down; `best` is the sweep's own choice, which looks at the mean over seeds."""
    sign = -1 if results.direction == "maximize" else 1
    values = {trial.number: value for trial in results.trials if (value := _value(trial)) is not None}
    found = sorted(
        (trial for trial in results.trials if trial.number in values),
        key=lambda trial: (sign * values[trial.number], trial.number),
    )
    best = results.best if results.best in values or not found else found[0].number
    num_good = len(found) / 4 if len(found) > 4 else 0
    return [
        Scored(
            trial,
            values[trial.number],
            _BEST if trial.number == best else _GOOD if place < num_good else _OTHER,
        )
        for place, trial in enumerate(found)
    ]


def _story(results: SweepResults, scored: Sequence[Scored]) -> str:
    states: dict[str, int] = {}
    for trial in results.trials:
        states[trial.state] = states.get(trial.state, 0) + 1
    counts = ", ".join(f"{count} {state}" for state, count in states.items()) or "none yet"
    text = (
        f"{results.name}: students by state: {counts}, all from the cache {results.cache_fingerprint[:12]}, varied in "
        f"{', '.join(results.varied) or 'nothing'}."
    )
    if scored:
        best = next((one for one in scored if one.entry is _BEST), scored[0])
        text += (
            f" Its choice is student {best.trial.number}, {results.metric} {best.value:.4g}, with "
            f"{in_words(best.trial.parameters) or 'no setting'}."
        )
    return text


def _table(results: SweepResults, scored: Sequence[Scored]) -> Table:
    rows = []
    for one in scored[:_MOST_ROWS]:
        validation, train, model = (mapping(part) for part in (one.trial.validation, one.trial.train, one.trial.model))
        rows.append(
            (
                str(one.trial.number),
                *(setting_text(one.trial.parameters.get(name)) for name in results.varied),
                f"{one.value:.4g}",
                cell(validation.get("perplexity"), "{:.2f}"),
                cell(validation.get("kl_to_teacher_nats"), "{:.4f}"),
                bytes_text(size) if (size := number(model.get("packed_bytes"))) else "-",
                cell(train.get("positions_per_s"), "{:,.0f}"),
            )
        )
    better = "higher" if results.direction == "maximize" else "lower"
    caption = f"From the best down; {better} is better." + (
        f" {len(scored) - _MOST_ROWS} more are in {RESULTS_NAME}." if len(scored) > _MOST_ROWS else ""
    )
    header = (
        "student",
        *short_keys(list(results.varied)).values(),
        results.metric,
        "perplexity",
        "KL, nats",
        "packed",
        "positions/s",
    )
    return Table(header, rows, caption, num_left=1 + len(results.varied))


def _parallel(names: Sequence[str], metric: str, scored: Sequence[Scored], key: str) -> Figure:
    scales = [Scale.of([one.trial.parameters.get(name) for one in scored]) for name in names]
    scales.append(Scale.of([one.value for one in scored]))

    def plot(axes: Axes) -> None:
        last = len(names)
        for one in reversed(scored):
            heights = [scale.place(one.trial.parameters.get(name)) for scale, name in zip(scales, names, strict=False)]
            heights.append(scales[-1].place(one.value))
            alpha, width = (1.0, 3.0) if one.entry is _BEST else (0.75, 1.8) if one.entry is _GOOD else (0.4, 1.2)
            axes.plot(range(last + 1), heights, color=COLORS[one.entry.color], alpha=alpha, linewidth=width)
        behind = {"facecolor": COLORS["surface"], "alpha": 0.85, "pad": 1, "edgecolor": "none"}
        for place, scale in enumerate(scales):
            axes.axvline(place, color=COLORS["muted"], linewidth=1)
            for height, text in scale.ticks:
                axes.annotate(
                    text, (place, height), xytext=(4, 0), textcoords="offset points", va="center", bbox=behind
                )
        titles = [*short_keys(list(names)).values(), *short_keys([metric]).values()]
        axes.set_xticks(range(last + 1), [plain(title, 20) for title in titles])
        axes.set_yticks([])
        axes.set_xlim(-0.1, last + 0.35)
        axes.set_ylim(-0.06, 1.06)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False)

    return Figure(
        key,
        "Every student as a line",
        drawn(plot, key, height=320, width=WIDE),
        f"Each line is a student; it crosses every axis at its setting and ends at its {metric}."
        + " Settings on which the lines of the best quarter gather matter." * any(s.entry is _GOOD for s in scored),
        legend(scored),
        is_wide=True,
    )


def _scatter(name: str, metric: str, scored: Sequence[Scored], key: str) -> Figure:
    scale = Scale.of([one.trial.parameters.get(name) for one in scored])

    def plot(axes: Axes) -> None:
        for one in reversed(scored):
            setting = one.trial.parameters.get(name)
            x = setting if scale.has_numbers else scale.place(setting)
            axes.plot([x], [one.value], marker="o", markersize=7, color=COLORS[one.entry.color], alpha=0.8)
        axes.set_xlabel(plain(name, 40))
        axes.set_ylabel(plain(metric, 30))
        if scale.has_numbers:
            scale_axes(axes, log_x=scale.is_log)
        else:
            axes.set_xticks([height for height, _ in scale.ticks], [plain(text, 14) for _, text in scale.ticks])
            axes.set_xlim(-0.08, 1.08)
            numbers_on(axes.yaxis)

    titles = short_keys([metric, name])
    return Figure(
        key,
        f"{titles[metric]} by {titles[name]}",
        drawn(plot, key, height=230),
        "Each dot is a student, over all settings of the rest." + " The axis is logarithmic." * scale.is_log,
        legend(scored),
    )


def _frontier(scored: Sequence[Scored], key: str) -> list[Block]:
    points = []
    for one in scored:
        size = number(mapping(one.trial.model).get("packed_bytes"))
        perplexity = number(mapping(one.trial.validation).get("perplexity"))
        if size is not None and perplexity is not None:
            points.append((size, perplexity, one.trial.number))
    if not points:
        return []
    points.sort()
    frontier: list[tuple[float, float, int]] = []
    for point in points:
        if not frontier or point[1] < frontier[-1][1]:
            frontier.append(point)
    unit, divisor = ("MiB", 2**20) if points[-1][0] >= 2**20 else ("KiB", 2**10)

    def plot(axes: Axes) -> None:
        x = [size / divisor for size, _, _ in points]
        axes.plot(x, [value for _, value, _ in points], "o", markersize=6, color=COLORS["muted"], alpha=0.6)
        axes.plot([size / divisor for size, _, _ in frontier], [value for _, value, _ in frontier], "o-", markersize=8,
                  color=COLORS["s2"], drawstyle="steps-post")  # fmt: skip
        scale_axes(axes, log_y=max(p for _, p, _ in points) > 3 * min(p for _, p, _ in points))
        if len(set(x)) == 1:
            axes.set_xlim(x[0] * 0.9, x[0] * 1.1)
        axes.set_xlabel(f"packed bytes, {unit}")
        axes.set_ylabel("held-out perplexity")

    named = ", ".join(f"{number} ({bytes_text(size)}, {value:.4g})" for size, value, number in frontier)
    same = " All students have one size." if len({size for size, _, _ in points}) == 1 else ""
    return [
        Figure(
            key,
            "Perplexity against bytes",
            drawn(plot, key),
            f"Packed size of each student and its held-out perplexity. On the frontier no student is both smaller and "
            f"better: {named}.{same}",
            (Entry("frontier", "s2"), Entry("dominated", "muted")),
        )
    ]


def legend(scored: Sequence[Scored]) -> list[Entry]:
    """The entries that are drawn."""
    return [entry for entry in (_BEST, _GOOD, _OTHER) if any(one.entry is entry for one in scored)]


def _value(trial: Trial) -> float | None:
    return number(trial.value) if trial.state == "complete" else None
