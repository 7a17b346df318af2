"""Tables of what a run achieved, from the summaries on disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tristill.cache.regular_file import read_json_object
from tristill.pipeline.errors import MissingInputError
from tristill.pipeline.provenance import read_provenance
from tristill.pipeline.terminal import cells
from tristill.pipeline.workspace import Workspace
from tristill.stages.losses.config import DEFAULT_ALPHA
from tristill.stages.visible import visible

COLUMNS = {
    "perplexity": ("perplexity", "{:.2f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "kl_to_teacher_nats": ("KL to teacher, nats", "{:.4f}"),
    "top1_agreement": ("top-1 agreement", "{:.1%}"),
    "acceptance_rate": ("acceptance", "{:.1%}"),
    "expected_calibration_error": ("ECE", "{:.4f}"),
}


@dataclass(frozen=True)
class Row:
    """One model: what it is, whom it learned from, how it was trained, and its held-out metrics."""

    name: str
    taught_by: str | None
    loss: str | None
    summary: dict[str, Any]


def run_rows(workspace: Workspace) -> list[Row]:
    """The teacher, if it is here, and every finished student: those of the chain first, then those of the config."""
    teacher = workspace.run_dir / "teacher"
    rows = [Row("teacher", None, None, read_summary(teacher))] if has_summary(teacher) else []
    found = [path.name for path in sorted((workspace.run_dir / "students").glob("*")) if has_summary(path)]
    configured = [name for name in [*workspace.config.stages, *workspace.config.student_names] if name in found]
    for name in [*configured, *(name for name in found if name not in configured)]:
        folder = workspace.student(name)
        record = read_provenance(folder)
        loss = loss_text(record.settings["distill"]) if record else None
        rows.append(Row(name, workspace.config.teacher_of(name) or "teacher", loss, read_summary(folder)))
    return rows


def loss_text(distill: Mapping[str, Any]) -> str:
    """A student's terms on distributions in a few words, from its recorded settings; alpha alone, of the shorthand."""
    terms = distill.get("losses")
    if not terms:
        alpha = distill["alpha"]
        return _setting_text(DEFAULT_ALPHA if alpha is None else alpha)
    return ", ".join(f"{term['kind']} {_setting_text(term['weight'])}" for term in terms)


def _setting_text(setting: float | Mapping[str, Any]) -> str:
    return f"{setting:g}" if isinstance(setting, int | float) else str(setting["kind"])


def has_summary(folder: Path) -> bool:
    """Whether a model was finished there."""
    return (folder / "summary.json").is_file()


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished model."""
    try:
        summary = read_json_object(folder / "summary.json")
    except (OSError, ValueError) as exc:
        raise MissingInputError(f"{folder / 'summary.json'}: cannot be read ({exc}); train the model first") from exc
    return summary


def metrics_table(metrics: dict[str, dict[str, Any]]) -> str:
    """Held-out metrics per model, as aligned text."""
    header = ["model", *(title for title, _ in COLUMNS.values())]
    lines = [
        [name, *(_cell(values.get(key), form) for key, (_, form) in COLUMNS.items())]
        for name, values in metrics.items()
    ]
    return text_table([header, *lines])


def run_table(workspace: Workspace) -> str:
    """All models of a run: held-out metrics, training speed and memory; then the size of the cache."""
    rows = run_rows(workspace)
    is_chain = bool(workspace.config.stages)
    titles = [title for title, _ in COLUMNS.values()]
    header = ["model", *["taught by"] * is_chain, "alpha or terms", *titles, "steps", "positions/s", "peak RSS, MiB"]
    lines = []
    for row in rows:
        train = row.summary["train"] or {}  # none of a teacher that was given
        lines.append(
            [
                row.name,
                *[row.taught_by or "-"] * is_chain,
                row.loss or "-",
                *(_cell(row.summary["validation"].get(key), form) for key, (_, form) in COLUMNS.items()),
                _cell(train.get("steps"), "{}"),
                _cell(train.get("positions_per_s"), "{:,.0f}"),
                _cell(train.get("peak_rss_mib"), "{:,.0f}"),
            ]
        )
    return text_table([header, *lines])


def text_table(lines: list[list[str]]) -> str:
    """Aligned columns in Markdown, so that what is printed can be pasted; every cell is visible text on one line."""
    lines = [[visible(cell) for cell in line] for line in lines]
    widths = [max(cells(line[i]) for line in lines) for i in range(len(lines[0]))]
    rendered = [
        "| " + " | ".join(cell + " " * (width - cells(cell)) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([rendered[0], rule, *rendered[1:]])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
