"""Evaluates students as they are deployed: sizes and speeds, as a table and in deployment.json."""

from tristill.cache.atomic import write_atomically
from tristill.pipeline.config import DEFAULT_STUDENT
from tristill.pipeline.results import text_table
from tristill.pipeline.workspace import Workspace
from tristill.stages.deployment.measure import measure_deployment
from tristill.stages.deployment.report import Deployment, Form, Speed, Spread

HEADER = (
    "model", "form", "bytes on disk", "of FP32", "of fp16", "run by",
    "prompt, tokens/s", "over the teacher", "generation, tokens/s", "over the teacher",
)  # fmt: skip


def evaluate_deployment(workspace: Workspace, names: tuple[str, ...], threads: int | None) -> Deployment:
    """Students by name or model folder, `student` if none is named, beside the run's teacher.

    Writes deployment.json into the run folder.
    """
    students = [name for name in names if name != "teacher"] or [DEFAULT_STUDENT]
    teacher = workspace.model_folder("teacher")
    found = measure_deployment(teacher, {name: workspace.model_folder(name) for name in students}, threads)
    write_atomically(workspace.run_dir / "deployment.json", (found.model_dump_json(indent=2) + "\n").encode("ascii"))
    return found


def deployment_table(found: Deployment) -> str:
    """One row a form, then what could not be run, and how the rest was timed."""
    rows, notes = deployment_rows(found)
    return "\n".join([text_table([list(HEADER), *rows]), *notes])


def deployment_rows(found: Deployment) -> tuple[list[list[str]], list[str]]:
    """(cells under HEADER, one row a form; lines that say what could not be run, and how the rest was timed)."""
    reasons: list[str] = []
    for form in found.forms:
        if form.why_not is not None and form.why_not not in reasons:
            reasons.append(form.why_not)
    lines = [f"({number}) {reason}" for number, reason in enumerate(reasons, start=1)]
    llama_cpp = f", llama.cpp (xllamacpp {found.xllamacpp}) by its own" if found.xllamacpp else ""
    lines.append(
        f"{found.prompt_tokens} tokens of prompt, then {found.new_tokens} one by one; median (least to most) of "
        f"{found.rounds} rounds of turns; threads of each: {found.threads}; PyTorch {found.torch} by the "
        f"clock around it{llama_cpp}"
    )
    return [_cells(form, reasons) for form in found.forms], lines


def _cells(form: Form, reasons: list[str]) -> list[str]:
    not_run = "-" if form.why_not is None else f"not run ({reasons.index(form.why_not) + 1})"
    return [
        form.model,
        form.form,
        "-" if form.disk_bytes is None else f"{form.disk_bytes:,}",
        _percent(form.of_fp32),
        _percent(form.of_fp16),
        form.runtime or not_run,
        *_speed_cells(form.prompt),
        *_speed_cells(form.generation),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _speed_cells(speed: Speed | None) -> tuple[str, str]:
    if speed is None:
        return "-", "-"
    ratio = "-" if speed.to_teacher is None else _spread_text(speed.to_teacher, "{:.2f}")
    return _spread_text(speed.tokens_per_s, "{:,.0f}"), ratio


def _spread_text(spread: Spread, form: str) -> str:
    return f"{form} ({form} to {form})".format(spread.median, spread.min, spread.max)
