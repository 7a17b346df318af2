"""What students learn from each profile: three seeds of the demo's student per cache, judged by the exact teacher.

    python -m benchmarks.cache_students [--run-dir runs/demo] [--seeds 0 1 2]

Needs the data and teacher of a run (`make teacher`). Dumps one cache per profile and trains on each, at equal steps,
learning rate and alpha; what is there already is kept. Students are evaluated against the teacher forwarded online,
so that no cache judges itself.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from tristill.cache import open_cache
from tristill.pipeline.cache_info import cache_info
from tristill.pipeline.config import load_config
from tristill.pipeline.results import text_table
from tristill.stages.distill.distill import distill
from tristill.stages.dump.config import DumpConfig
from tristill.stages.dump.dump import dump_logits
from tristill.stages.evaluate.evaluate import evaluate
from tristill.stages.models.checkpoint import load_model
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.online import OnlineSource

RESULTS = Path(__file__).parent / "results" / "cache_students.json"
PROFILES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "transform": {"kind": "transform", "step": 0.3},
    "sampled, 5 draws": {"kind": "sampled", "draws": 5},
    "topk, bucket": {"kind": "topk"},
    "topk 16, renormalised": {
        "kind": "topk",
        "tail": "nothing",
        "head": {"probability": 0.0, "min_entries": 16, "max_entries": 16},
    },
}
METRICS = ("perplexity", "kl_to_teacher_nats", "top1_agreement", "expected_calibration_error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()

    config, run_dir = load_config(arguments.config), arguments.run_dir
    device = torch.device("cpu")
    teacher = load_model(run_dir / "teacher").eval()
    judge = OnlineSource(run_dir / "data", device, teacher=teacher)
    results: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        for name, profile in PROFILES.items():
            slug = slug_of(name)
            cache_dir = run_dir / "benchmark-caches" / slug
            dump = config.cache.model_dump(mode="json") | {"profile": profile, "fidelity": None}
            dump_logits(DumpConfig.model_validate(dump), run_dir / "data", run_dir / "teacher", cache_dir)
            folder = run_dir / "benchmark-students" / f"{slug}-seed-{seed}"
            if not (folder / "summary.json").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                training = config.distill.training.model_copy(update={"seed": seed})
                settings = config.distill.model_copy(update={"training": training, "targets": "cached"})
                source = CachedSource(open_cache(cache_dir), device)
                shape = config.student_shape
                distill(
                    settings, config.student, shape, source, device, folder, run_dir / "teacher", config.evaluate, {}
                )
            metrics = evaluate(load_model(folder), judge, config.evaluate, name).model_dump()
            found = results.setdefault(
                name, {"profile": profile, "bytes_per_position": on_disk(cache_dir), "seeds": {}}
            )
            found["seeds"][seed] = metrics
            save(results, arguments, config.distill.alpha)
    print(table(results))


def slug_of(name: str) -> str:
    """The name of a profile as that of a folder."""
    return "".join(character if character.isalnum() else "-" for character in name)


def on_disk(cache_dir: Path) -> float:
    """Bytes per position, all files counted."""
    return float(cache_info(cache_dir)["bytes_per_position"]["on disk"])


def save(results: dict[str, Any], arguments: argparse.Namespace, alpha: float) -> None:
    """Keep what is measured so far."""
    content = {
        "config": str(arguments.config),
        "alpha": alpha,
        "results": results,
        "environment": environment(),
        "markdown": table(results),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """Means and deviations over the seeds."""
    rows = []
    for name, found in results.items():
        cells = []
        for metric in METRICS:
            values = [seed[metric] for seed in found["seeds"].values()]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            digits = 2 if metric == "perplexity" else 4
            cells.append(f"{statistics.mean(values):.{digits}f} +- {spread:.{digits}f}")
        rows.append([name, f"{found['bytes_per_position']:.1f}", *cells])
    titles = ["profile", "bytes/position", "perplexity", "KL to teacher, nats", "top-1 agreement", "ECE"]
    return text_table([titles, *rows])


if __name__ == "__main__":
    main()
