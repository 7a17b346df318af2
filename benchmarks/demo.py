"""The demo at several seeds: what distillation gains at equal steps, and what it costs.

    python -m benchmarks.demo [--run-dir runs/demo] [--seeds 3]

Runs `tristill run` for the config, then further seeds of both students from the same teacher and cache. Resumable: what
is done is not done again. Writes benchmarks/results/demo.json, which README quotes.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from tristill.pipeline.cache_info import cache_info
from tristill.pipeline.config import DEFAULT_STUDENT, load_config
from tristill.pipeline.results import COLUMNS, loss_text, read_summary, text_table
from tristill.pipeline.workspace import Workspace

RESULTS = Path(__file__).parent / "results" / "demo.json"
_TRAIN = {"positions_per_s": ("positions/s", "{:,.0f}"), "peak_rss_mib": ("peak RSS, MiB", "{:,.0f}")}


def tristill(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "tristill.pipeline", *arguments], check=True, stdout=subprocess.DEVNULL)


def dotted(changes: dict[str, Any], path: str = "") -> list[str]:
    """A variant's changes as arguments of --set."""
    return [
        line
        for key, value in changes.items()
        for line in (
            dotted(value, f"{path}{key}.") if isinstance(value, dict) else [f"{path}{key}={json.dumps(value)}"]
        )
    ]


def spread(values: list[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} +- {form.format(statistics.stdev(values))}"


def cells(summaries: list[dict[str, Any]]) -> list[str]:
    """One cell per column: mean and standard deviation over seeds."""
    row = []
    for part, columns in (("validation", COLUMNS), ("train", _TRAIN)):
        for key, (_, form) in columns.items():
            values = [summary[part][key] for summary in summaries]
            row.append("-" if values[0] is None else spread(values, form))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()

    where = ["--config", str(arguments.config), "--run-dir", str(arguments.run_dir)]
    tristill("run", *where)
    workspace = Workspace(load_config(arguments.config), arguments.run_dir)
    students: dict[str, list[dict[str, Any]]] = {}
    for name in workspace.config.student_names:
        students[name] = [read_summary(workspace.student(name))]
        for seed in range(1, arguments.seeds):
            changes = [*dotted(workspace.config.variants.get(name, {})), f"distill.training.seed={seed}"]
            other = f"{name}-seed-{seed}"
            tristill("distill", "--name", other, *where, *(part for change in changes for part in ("--set", change)))
            students[name].append(read_summary(workspace.student(other)))
    teacher = read_summary(workspace.teacher)
    titles = [title for title, _ in (*COLUMNS.values(), *_TRAIN.values())]
    rows = [["teacher, FP32", *cells([teacher])]]
    for name, summaries in students.items():
        loss = loss_text(workspace.config.for_student(name).distill.model_dump(mode="json"))
        label = "with the teacher" if name == DEFAULT_STUDENT else name
        rows.append([f"ternary student, {label}, alpha {loss}", *cells(summaries)])
    info = cache_info(workspace.cache)
    steps = {name: workspace.config.for_student(name).distill.training.steps for name in students}
    result = {
        "config": str(arguments.config),
        "seeds": arguments.seeds,
        "steps": steps,
        "teacher": teacher,
        "students": students,
        "cache_bytes_per_position": info["bytes_per_position"],
        "environment": environment(),
        "markdown": text_table([["model", *titles], *rows]),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(result["markdown"])
    print(f"cache: {info['bytes_per_position']['on disk']:.1f} bytes/position on disk")


if __name__ == "__main__":
    main()
