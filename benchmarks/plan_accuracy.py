"""What `tristill plan` says beforehand, beside what happens: plans a config in a fresh folder, then runs it.

    python -m benchmarks.plan_accuracy [--config configs/demo.toml] [--run-dir runs/plan-accuracy] [--in-turn]

The folder must be new. `--in-turn` plans again, what is left, when the teacher is there and when a cache is, and
compares each step with the plan before it: for a machine that has other work, where only what is measured close
together can be compared; it also says what the cache's bytes are predicted as once its teacher is there. Writes
benchmarks/results/plan_accuracy.json, which docs/measured.md quotes, for the config's name; other configs stay.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from tristill.pipeline.config import load_config
from tristill.pipeline.plan.compare import Comparison, compare
from tristill.pipeline.plan.prediction import Plan, load_plan
from tristill.pipeline.plan.text import comparison_table
from tristill.pipeline.results import text_table
from tristill.pipeline.runner import plan as steps_to_run
from tristill.pipeline.workspace import Workspace

RESULTS = Path(__file__).parent / "results" / "plan_accuracy.json"


def tristill(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "tristill.pipeline", *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/plan-accuracy"))
    parser.add_argument("--in-turn", action="store_true")
    arguments = parser.parse_args()
    if arguments.run_dir.exists():
        parser.error(f"--run-dir {arguments.run_dir}: is there already; a plan is tested on a run that is not")
    workspace = Workspace(load_config(arguments.config), arguments.run_dir)
    where = ["--config", str(arguments.config), "--run-dir", str(arguments.run_dir)]
    tristill("plan", *where)
    first = plan_in(workspace)
    rows: list[Comparison] = []
    while todo := steps_to_run(workspace, "distill"):
        tristill(*todo[0].label.split(), *where)
        rows += [row for row in compare(workspace) if row.what.startswith(f"{todo[0].label}: ")]
        if arguments.in_turn and todo[0].command in ("teacher", "dump-logits"):
            tristill("plan", *where)
    first.save(arguments.run_dir)  # what was said before anything was there
    found = {"planned_s": first.planned_s, "at first": records(compare(workspace)), "in turn": records(rows)}
    measured = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"configs": {}}
    measured["configs"][arguments.config.stem] = {**found, "threads": first.threads, "environment": environment()}
    measured["markdown"] = markdown(measured["configs"])
    RESULTS.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(comparison_table(compare(workspace)))
    print(measured["markdown"])


def plan_in(workspace: Workspace) -> Plan:
    found = load_plan(workspace.run_dir)
    assert found is not None, "it was just made"
    return found


def records(rows: list[Comparison]) -> list[dict[str, Any]]:
    return [
        {"what": row.what, "unit": row.unit, "predicted": row.predicted, "happened": row.happened, "ratio": row.ratio}
        for row in rows
    ]


def markdown(configs: dict[str, Any]) -> str:
    """Happened over predicted, per step: of the first plan, and of the one made just before the step."""
    units = {"s": "time", "MiB": "peak RSS", "bytes": "cache, all files"}
    lines = [["config", "step", *(f"{title}: {when}" for title in units.values() for when in ("first", "in turn"))]]
    for name, found in configs.items():
        ratios = {
            (when, row["what"], row["unit"]): row["ratio"] for when in ("at first", "in turn") for row in found[when]
        }
        steps = dict.fromkeys(row["what"].split(": ")[0] for row in found["at first"])
        for step in steps:
            cells = []
            for unit, title in (("s", "time"), ("MiB", "peak RSS"), ("bytes", "all files")):
                for when in ("at first", "in turn"):
                    ratio = ratios.get((when, f"{step}: {title}", unit))
                    cells.append("-" if ratio is None else f"{ratio:.2f}")
            lines.append([name, step, *cells])
    return text_table(lines)


if __name__ == "__main__":
    main()
