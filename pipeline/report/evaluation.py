"""What the models are worth on held-out text."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from tristill.cache.regular_file import read_file, read_json_object
from tristill.pipeline.report.drawing import COLORS, Axes, drawn, plain, scale_axes, shares_on
from tristill.pipeline.report.run import Model, Run, mapping
from tristill.pipeline.report.section import Block, Figure, Heading, Missing, Section, Table
from tristill.pipeline.results import COLUMNS
from tristill.pipeline.units import bytes_text, cell, number

_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


def evaluation_section(run: Run) -> Section:
    """The table, perplexities, and the calibration diagram."""
    finished = [model for model in (run.teacher, *run.students) if model.is_finished]
    if not finished:
        return Section("evaluation", "Evaluation", [Missing("No model is finished; run tristill run --until distill.")])
    blocks: list[Block] = [_table(finished)]
    drawn_models = [model for model in run.models if model.perplexity is not None]
    if drawn_models:
        blocks.append(_perplexities(drawn_models))
    blocks.append(_calibration(run))
    blocks += _deployment(run)
    return Section("evaluation", "Evaluation", blocks)


def _table(models: Sequence[Model]) -> Table:
    rows = [
        (
            model.name,
            *(cell(model.validation.get(key), form) + _error(model, key, form) for key, (_, form) in COLUMNS.items()),
            cell(model.summary.get("parameters", model.shape.get("parameters")), "{:,.0f}"),
            bytes_text(size) if (size := number(model.shape.get("packed_bytes"))) else "-",
        )
        for model in models
    ]
    positions = cell(models[0].validation.get("positions"), "{:,.0f}")
    caption = (
        f"Means over {positions} held-out positions. KL, agreement (the same most likely token) and acceptance (as a "
        "draft for speculative decoding) are against the teacher's targets; ECE is the expected calibration error; "
        "packed is the size with ternary weights at 2 bits and all others at 16."
    )
    samples = [mapping(model.validation.get("standard_errors")) for model in models]
    if named := next((f"{found['num_units']} {found['unit']}s" for found in samples if found.get("num_units")), None):
        caption += (
            f" {_PLUS_MINUS} is the standard error over {named}, of each mean by itself: models are compared on the "
            "same text, so differences between them are known better."
        )
    return Table(("model", *(title for title, _ in COLUMNS.values()), "parameters", "packed"), rows, caption)


def _error(model: Model, key: str, form: str) -> str:
    """The standard error of a mean, in its form; those of perplexity and bits per byte follow from the loss's."""
    errors = mapping(model.validation.get("standard_errors"))
    found, loss_error = number(errors.get(key)), number(errors.get("loss_nats"))
    value, loss = number(model.validation.get(key)), number(model.validation.get("loss_nats"))
    if value is not None and loss_error is not None and key == "perplexity":
        found = value * loss_error
    elif value is not None and loss_error is not None and loss and key == "bits_per_byte":
        found = value * loss_error / loss
    return "" if found is None else f" {_PLUS_MINUS} {form.format(found)}"


def _perplexities(models: Sequence[Model]) -> Figure:
    values = [model.perplexity or 1.0 for model in models]

    def plot(axes: Axes) -> None:
        places = list(range(len(models)))
        if models[0].name == "teacher":
            axes.axvline(values[0], color=COLORS["ink"], linewidth=1, linestyle=(0, (4, 2)))
        for place, model, value in zip(places, models, values, strict=True):
            axes.plot([value], [place], marker="o", markersize=9, color=COLORS[model.entry.color])
            axes.annotate(f"{value:.4g}", (value, place), xytext=(9, 0), textcoords="offset points", va="center")
        axes.set_yticks(places, [plain(model.name, 22) for model in models])
        axes.invert_yaxis()
        axes.margins(y=0.6 / len(models))
        axes.set_xlim(min(values) / 1.08, max(values) * 1.4)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        scale_axes(axes, log_x=True)
        axes.yaxis.set_ticks(places, [plain(model.name, 22) for model in models])
        axes.set_xlabel("held-out perplexity")

    ordered = sorted(zip(values, models, strict=True), key=lambda pair: pair[0])
    teacher = next((value for value, model in ordered if model.name == "teacher"), None)
    best = next(((value, model) for value, model in ordered if model.name != "teacher"), None)
    caption = "Lower is better; the axis is logarithmic."
    if teacher is not None and best is not None:
        caption += (
            f" The dashed line is the teacher; {best[1].name} comes nearest at {best[0] / teacher:.2f} times its "
            "perplexity."
        )
    return Figure("perplexity", "Perplexity", drawn(plot, "perplexity", height=80 + 28 * len(models)), caption)


def _calibration(run: Run) -> Block:
    recomputed = _evaluation_file(run)
    found = [(model, bins) for model in run.models if (bins := _bins(model, recomputed))]
    if not found:
        return Missing(
            "There is no calibration diagram: these summaries were written before its bins were kept; run tristill "
            "evaluate, which computes them again."
        )

    def plot(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=COLORS["muted"], linewidth=1, linestyle=(0, (2, 2)))
        for model, bins in found:
            total = sum(count for count, _, _ in bins)
            x, y = [confidence for _, _, confidence in bins], [accuracy for _, accuracy, _ in bins]
            color = COLORS[model.entry.color]
            axes.plot(x, y, color=color, linewidth=1.5, linestyle=(0, (4, 2)) if model.entry.is_dashed else "-")
            axes.scatter(x, y, [12 + 240 * count / total for count, _, _ in bins], color=color, alpha=0.7, zorder=3)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.set_xlabel("confidence, the largest probability")
        axes.set_ylabel("accuracy")
        shares_on(axes.xaxis)
        shares_on(axes.yaxis)

    errors = ", ".join(
        f"{model.name} {error:.4f}"
        for model, _ in found
        if (error := number(model.validation.get("expected_calibration_error"))) is not None
    )
    without = [model.name for model in run.models if model.is_finished and model not in [known for known, _ in found]]
    caption = (
        "How often the most likely token is right, by how likely the model holds it; dots grow with their share of "
        "positions. On the diagonal a model knows what it knows; below it, it is overconfident. Expected calibration "
        f"error: {errors}."
    )
    if without:
        caption += f" Without bins: {', '.join(without)}; run tristill evaluate."
    return Figure("calibration", "Calibration", drawn(plot, "calibration", height=340), caption,
                  [model.entry for model, _ in found])  # fmt: skip


def _deployment(run: Run) -> list[Block]:
    """Sizes and speeds, if they were measured."""
    from tristill.pipeline.deployment import HEADER, deployment_rows
    from tristill.stages.deployment.report import Deployment

    try:
        found = Deployment.model_validate_json(read_file(run.workspace.run_dir / "deployment.json"))
    except (OSError, ValidationError):
        return []
    rows, notes = deployment_rows(found)
    sizes, speeds = [0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 8, 9]  # all columns are wider than the page
    return [
        Heading("As deployed"),
        *(
            Table([HEADER[i] for i in shown], [[row[i] for i in shown] for row in rows], caption, num_left=2)
            for shown, caption in ((sizes, ""), (speeds, ". ".join(notes) + "."))
        ),
    ]


def _evaluation_file(run: Run) -> Mapping[str, Any]:
    """What `tristill evaluate` last wrote."""
    try:
        return read_json_object(run.workspace.run_dir / "evaluation.json")
    except (OSError, ValueError):
        return {}


def _bins(model: Model, recomputed: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """(count, accuracy, confidence) of bins that are not empty: of the summary, or else as computed again."""
    kept = model.validation.get("calibration") or mapping(recomputed.get(model.name)).get("calibration") or []
    rows = [
        tuple(number(mapping(one).get(key)) for key in ("count", "accuracy", "confidence"))
        for one in (kept if isinstance(kept, Sequence) else [])
    ]
    return [(count, accuracy, confidence) for count, accuracy, confidence in rows
            if count and accuracy is not None and confidence is not None]  # fmt: skip
