"""What distillation methods make of the demo's student: several seeds, two budgets, judged by the exact teacher.

    python -m benchmarks.methods [--run-dir runs/demo] [--seeds 0 1 2] [--budget 1] [--jobs 2] [--only NAME ..]

Needs the data and teacher of a run (`make teacher`). Every student has the demo's shape, steps times the budget,
learning rate and batches; what differs is named in METHODS. Caches hold as many windows as the budget sees, once. Each
student is trained in a process of its own, on one thread, `--jobs` of them at a time, so speeds are comparable with one
another and low. What is there already is kept. Students are evaluated against the teacher forwarded online.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from pipeline.config import Config, load_config
from pipeline.results import text_table

RESULTS = Path(__file__).parent / "results" / "methods.json"
ALPHA = 0.2
HIDDEN = {"layers": "all", "normalise": True}
METHODS: dict[str, dict[str, Any]] = {
    "labels alone": {"distill": {"alpha": 1.0}},
    "labels alone, FP32 twin": {
        "distill": {"alpha": 1.0},
        "student": {"quantize": {"weights": "none", "activations": "none"}},
    },
    "forward KL, tau 1": {"distill": {"alpha": ALPHA}},
    "forward KL, tau 2": {"distill": {"alpha": ALPHA, "temperature": 2.0}},
    "forward KL, tau 5": {"distill": {"alpha": ALPHA, "temperature": 5.0}},
    "tail: bucket": {"distill": {"alpha": ALPHA, "tail": "bucket"}},
    "tail: renormalise": {"distill": {"alpha": ALPHA, "tail": "renormalise"}},
    "tail: zero": {"distill": {"alpha": ALPHA, "tail": "zero"}},
    "tail: uniform": {"distill": {"alpha": ALPHA, "tail": "uniform"}},
    "tail: sampled, 5 draws": {"distill": {"alpha": ALPHA}, "cache": {"profile": {"kind": "sampled", "draws": 5}}},
    "reverse KL": {"distill": {"losses": "reverse_kl"}},
    "Jensen-Shannon, beta 0.5": {"distill": {"losses": "jensen_shannon"}},
    "skew forward KL, 0.1": {"distill": {"losses": "skew_forward_kl"}},
    "skew reverse KL, 0.1": {"distill": {"losses": "skew_reverse_kl"}},
    "adaptive KL": {"distill": {"losses": "adaptive_kl"}},
    "total variation": {"distill": {"losses": "total_variation"}},
    "logit MSE": {"distill": {"losses": "logit_mse"}},
    "hidden states, MSE": {
        "distill": {"alpha": ALPHA, "hidden": HIDDEN},
        "cache": {"hidden_layers": [1, 2], "hidden": {"coding": {"kind": "transform"}}},
    },
    "curriculum by entropy": {"distill": {"alpha": ALPHA, "curriculum": {"by": "entropy"}}},
    "hard examples, half, by loss": {"distill": {"alpha": ALPHA, "mining": {"fraction": 0.5}}},
    "from the teacher's weights, labels alone": {"distill": {"alpha": 1.0}, "student": {"init": "teacher"}},
    "from the teacher's weights, forward KL": {"distill": {"alpha": ALPHA}, "student": {"init": "teacher"}},
}
METRICS = {
    "perplexity": ("perplexity", 1, 2),
    "kl_to_teacher_nats": ("KL to teacher, nats", 1, 4),
    "top1_agreement": ("top-1 agreement", 100, 1),
    "expected_calibration_error": ("ECE", 1, 4),
    "positions_per_s": ("positions/s", 1, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=1, help="steps and windows, times the demo's")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--one", action="store_true", help="train in this process: the first method, the first seed")
    arguments = parser.parse_args()
    if arguments.one:
        train(arguments, arguments.only[0], arguments.seeds[0])
        return
    for method in arguments.only:  # caches first, one after the other: students share them
        dump(arguments, method)
    jobs = [(method, seed) for seed in arguments.seeds for method in arguments.only]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for _ in pool.map(lambda job: _in_a_process(arguments, *job), jobs):
            collect(arguments)
    print(collect(arguments))


def _in_a_process(arguments: argparse.Namespace, method: str, seed: int) -> None:
    if (student_folder(arguments, method, seed) / "exact.json").is_file():
        return
    own = ["--config", str(arguments.config), "--run-dir", str(arguments.run_dir), "--budget", str(arguments.budget)]
    command = [sys.executable, "-m", "benchmarks.methods", *own, "--one", "--only", method, "--seeds", str(seed)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def config_of(arguments: argparse.Namespace, method: str, seed: int) -> Config:
    """The demo's config with what the method and the budget change."""
    base = load_config(arguments.config).model_dump(mode="json")
    changes = METHODS[method]
    training = base["distill"]["training"]
    training |= {
        "steps": training["steps"] * arguments.budget,
        "warmup_steps": training["warmup_steps"] * arguments.budget,
        "seed": seed,
        "log_every": training["steps"] // 10,
    }
    base["cache"] |= {
        **changes.get("cache", {}),
        "max_train_windows": base["cache"]["max_train_windows"] * arguments.budget,
    }
    distill = dict(changes["distill"])
    if "losses" in distill:
        labels = {"kind": "cross_entropy", "weight": ALPHA}
        distill["losses"] = [labels, {"kind": distill["losses"], "weight": 1 - ALPHA}]
    base["distill"] = {**base["distill"], "alpha": None, "targets": "cached", **distill}
    base["student"] |= changes.get("student", {})
    return Config.model_validate({**base, "variants": {}})


def cache_folder(arguments: argparse.Namespace, method: str) -> Path:
    """Methods of equal caches share one."""
    own = METHODS[method].get("cache", {})
    kind = "hidden" if "hidden_layers" in own else own.get("profile", {}).get("kind", "transform")
    return Path(arguments.run_dir / "method-caches" / f"{kind}-{arguments.budget}")


def student_folder(arguments: argparse.Namespace, method: str, seed: int) -> Path:
    """Where one student is trained."""
    slug = "".join(character if character.isalnum() else "-" for character in method)
    return Path(arguments.run_dir / "method-students" / f"{slug}-{arguments.budget}-{seed}")


def dump(arguments: argparse.Namespace, method: str) -> None:
    """The cache of a method, unless it is there."""
    from stages.dump.dump import dump_logits

    folder = cache_folder(arguments, method)
    if not (folder / "cache.json").is_file():
        config = config_of(arguments, method, 0)
        dump_logits(config.cache, arguments.run_dir / "data", arguments.run_dir / "teacher", folder)


def train(arguments: argparse.Namespace, method: str, seed: int) -> None:
    """One student, and its metrics against the exact teacher."""
    import torch

    from cache import open_cache
    from stages.distill.distill import distill
    from stages.evaluate.evaluate import evaluate
    from stages.models.folder import load_model
    from stages.targets.cached import CachedSource
    from stages.targets.online import OnlineSource

    config, device = config_of(arguments, method, seed), torch.device("cpu")
    folder, teacher = student_folder(arguments, method, seed), arguments.run_dir / "teacher"
    folder.mkdir(parents=True, exist_ok=True)
    source = CachedSource(open_cache(cache_folder(arguments, method)), device)
    summary = distill(
        config.distill, config.student, config.student_shape, source, device, folder, teacher, config.evaluate, {}
    )
    judge = OnlineSource(arguments.run_dir / "data", device, teacher=load_model(teacher).eval())
    metrics = evaluate(load_model(folder), judge, config.evaluate, method).model_dump()
    found = {**metrics, "positions_per_s": summary.train.positions_per_s}
    (folder / "exact.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def collect(arguments: argparse.Namespace) -> str:
    """Gather what is measured so far, of both budgets, write it, and give it as a table."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted((arguments.run_dir / "method-students").glob("*/exact.json")):
        slug, budget, seed = path.parent.name.rsplit("-", 2)
        found.setdefault(budget, {}).setdefault(slug, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    results = {
        budget: {
            method: students[slug]
            for method in METHODS
            if (slug := student_folder(arguments, method, 0).name.rsplit("-", 2)[0]) in students
        }
        for budget, students in sorted(found.items())
    }
    markdown = "\n\n".join(
        f"The demo's budget:\n\n{table(methods)}"
        if budget == "1"
        else f"{budget} times the demo's budget:\n\n{table(methods)}"
        for budget, methods in results.items()
    )
    content = {"config": str(arguments.config), "results": results, "environment": environment(), "markdown": markdown}
    RESULTS.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return markdown


def table(methods: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Means and deviations over the seeds."""
    rows = []
    for method, seeds in methods.items():
        cells = []
        for metric, (_, factor, digits) in METRICS.items():
            values = [factor * seed[metric] for seed in seeds.values()]
            spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):,.{digits}f}{spread}")
        rows.append([method, str(len(seeds)), *cells])
    return text_table([["method", "seeds", *(title for title, _, _ in METRICS.values())], *rows])


if __name__ == "__main__":
    main()
