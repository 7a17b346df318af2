"""Tables of students: one for each row and seed, trained in a process of its own and judged by the exact teacher.

A script that makes such a table says which rows there are and what they change, and calls `main`. Needs the data and
teacher of a run (`make teacher`). Each student is trained on one thread, `--jobs` of them at a time. What is there
already is kept, and a student that was cut off goes on from its checkpoint. Students are evaluated against the teacher
forwarded online, so that no cache judges itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from tristill.pipeline.config import Config, load_config
from tristill.pipeline.results import text_table

METRICS = {
    "perplexity": ("perplexity", 1, 2),
    "kl_to_teacher_nats": ("KL to teacher, nats", 1, 4),
    "top1_agreement": ("top-1 agreement, %", 100, 1),
    "expected_calibration_error": ("ECE", 1, 4),
}


@dataclass(frozen=True)
class StudentTable:
    """name: of the script and of its results. rows: in the order of the table and of work within a seed.

    change: the plain config of a row, of the base config scaled to the budget. cache_of: where the cache of a row lies
    in a run folder, at a budget; one that is not there is dumped, but the run's own. students: folder of the students
    in a run folder. metrics: per key its title, a factor and digits.
    """

    name: str
    heading: str
    rows: tuple[str, ...]
    change: Callable[[dict[str, Any], str], dict[str, Any]]
    cache_of: Callable[[Path, str, int], Path]
    students: str
    metrics: Mapping[str, tuple[str, float, int]]

    @property
    def results(self) -> Path:
        """Where the measured table is kept."""
        return Path(__file__).parent / "results" / f"{self.name}.json"


def main(table: StudentTable, description: str | None) -> None:
    """The command line of a table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=1, help="steps and windows, times the config's")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=table.rows, default=list(table.rows))
    parser.add_argument("--results", type=Path, default=table.results)
    parser.add_argument("--one", action="store_true", help="train in this process: the first row, the first seed")
    arguments = parser.parse_args()
    if arguments.one:
        train(table, arguments, arguments.only[0], arguments.seeds[0])
        return
    for row in arguments.only:  # caches first, one after the other: students share them
        _dump(table, arguments, row)
    jobs = [(row, seed) for seed in arguments.seeds for row in arguments.only]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for _ in pool.map(lambda job: _in_a_process(table, arguments, *job), jobs):
            collect(table, arguments)
    print(collect(table, arguments))


def _in_a_process(table: StudentTable, arguments: argparse.Namespace, row: str, seed: int) -> None:
    if (student_folder(table, arguments, row, seed) / "exact.json").is_file():
        return
    own = ["--config", str(arguments.config), "--run-dir", str(arguments.run_dir), "--budget", str(arguments.budget)]
    command = [sys.executable, "-m", f"benchmarks.{table.name}", *own, "--one", "--only", row, "--seeds", str(seed)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def config_of(table: StudentTable, arguments: argparse.Namespace, row: str, seed: int) -> Config:
    """The config with what the row and the budget change."""
    base = load_config(arguments.config).model_dump(mode="json")
    training, cache = base["distill"]["training"], base["cache"]
    training |= {
        "steps": training["steps"] * arguments.budget,
        "warmup_steps": training["warmup_steps"] * arguments.budget,
        "seed": seed,
        "log_every": max(1, training["steps"] // 10),
    }
    if cache["max_train_windows"] is not None:
        cache["max_train_windows"] *= arguments.budget
    base["distill"]["targets"] = "cached"
    return Config.model_validate({**table.change(base, row), "variants": {}})


def student_folder(table: StudentTable, arguments: argparse.Namespace, row: str, seed: int) -> Path:
    """Where one student is trained."""
    return Path(arguments.run_dir / table.students / f"{slug_of(row)}-{arguments.budget}-{seed}")


def slug_of(row: str) -> str:
    """The name of a row as that of a folder."""
    return "".join(character if character.isalnum() else "-" for character in row)


def _dump(table: StudentTable, arguments: argparse.Namespace, row: str) -> None:
    """The cache of a row, unless it is there."""
    from tristill.stages.dump.dump import dump_logits

    folder = table.cache_of(arguments.run_dir, row, arguments.budget)
    if (folder / "cache.json").is_file():
        return
    if folder == arguments.run_dir / "cache":
        raise SystemExit(f"{folder}: found no cache; run `make dump-logits`, or name another --run-dir")
    config = config_of(table, arguments, row, 0)
    dump_logits(config.cache, arguments.run_dir / "data", arguments.run_dir / "teacher", folder)


def train(table: StudentTable, arguments: argparse.Namespace, row: str, seed: int) -> None:
    """One student, and its metrics against the exact teacher."""
    import torch

    from tristill.cache import open_cache
    from tristill.stages.distill.distill import distill
    from tristill.stages.evaluate.evaluate import evaluate
    from tristill.stages.models.checkpoint import load_model
    from tristill.stages.targets.cached import CachedSource
    from tristill.stages.targets.online import OnlineSource

    config, device = config_of(table, arguments, row, seed), torch.device("cpu")
    folder, teacher = student_folder(table, arguments, row, seed), arguments.run_dir / "teacher"
    folder.mkdir(parents=True, exist_ok=True)
    source = CachedSource(open_cache(table.cache_of(arguments.run_dir, row, arguments.budget)), device)
    summary = distill(
        config.distill, config.student, config.student_shape, source, device, folder, teacher, config.evaluate, {}
    )
    judge = OnlineSource(arguments.run_dir / "data", device, teacher=load_model(teacher).eval())
    metrics = evaluate(load_model(folder), judge, config.evaluate, row).model_dump()
    found = {**metrics, "positions_per_s": summary.train.positions_per_s}
    (folder / "exact.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def collect(table: StudentTable, arguments: argparse.Namespace) -> str:
    """Gather what is measured so far, of all budgets, write it, and give it as a table."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted((arguments.run_dir / table.students).glob("*/exact.json")):
        slug, budget, seed = path.parent.name.rsplit("-", 2)
        found.setdefault(budget, {}).setdefault(slug, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    results = {
        budget: {row: students[slug_of(row)] for row in table.rows if slug_of(row) in students}
        for budget, students in sorted(found.items())
    }
    markdown = "\n\n".join(
        f"The demo's budget:\n\n{_text(table, rows)}"
        if budget == "1"
        else f"{budget} times the demo's budget:\n\n{_text(table, rows)}"
        for budget, rows in results.items()
    )
    content = {"config": str(arguments.config), "results": results, "environment": environment(), "markdown": markdown}
    arguments.results.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return markdown


def _text(table: StudentTable, rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Means and deviations over the seeds."""
    lines = []
    for row, seeds in rows.items():
        cells = []
        for metric, (_, factor, digits) in table.metrics.items():
            values = [factor * seed[metric] for seed in seeds.values()]
            spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):,.{digits}f}{spread}")
        lines.append([row, str(len(seeds)), *cells])
    return text_table([[table.heading, "seeds", *(title for title, _, _ in table.metrics.values())], *lines])
