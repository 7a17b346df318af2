"""What a cached target costs: training steps/s on each profile over steps/s on the labels alone, in one process.

    python -m benchmarks.distill_speed [--run-dir runs/demo] [--rounds 12]

Needs the caches of benchmarks.cache_students. Every round trains a few steps per profile, in turn, each with its own
student, reading and decoding from its own cache as in training; the ratio is taken round by round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.cache_students import PROFILES, slug_of
from benchmarks.environment import environment
from tristill.cache import open_cache
from tristill.pipeline.config import Config, load_config
from tristill.pipeline.results import text_table
from tristill.stages.distill.objective import Objective
from tristill.stages.models.transformer import Transformer
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.source import TargetBatch, endless_batches
from tristill.stages.training.loop import StepInfo
from tristill.stages.training.optimizer import make_optimizer

RESULTS = Path(__file__).parent / "results" / "distill_speed.json"
LABELS = "labels alone"


class Runner:
    """A student that trains a few steps at a time."""

    def __init__(self, config: Config, cache_dir: Path, *, with_teacher: bool) -> None:
        self._source = CachedSource(open_cache(cache_dir), torch.device("cpu"))
        settings = config.distill if with_teacher else config.distill.model_copy(update={"alpha": 1.0})
        student = Transformer(config.student_shape, self._source.vocab_size, config.student.quantize)
        student.initialize(torch.Generator().manual_seed(0))
        self._objective = Objective(student, settings, self._source)
        self._optimizer = make_optimizer(self._objective, settings.training)
        self._batches: Iterator[TargetBatch] = endless_batches(
            self._source, settings.training.batch_windows, self._objective.signals, seed=0
        )(0)
        self._bfloat16 = settings.training.precision == "bfloat16"

    def seconds(self, steps: int) -> float:
        """Time of these many steps."""
        started = time.perf_counter()
        for _ in range(steps):
            batch = next(self._batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
                values = self._objective(batch, StepInfo(0))
            values.total.backward()
            nn.utils.clip_grad_norm_(self._objective.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES))
    arguments = parser.parse_args()

    config = load_config(arguments.config)
    folders = {name: arguments.run_dir / "benchmark-caches" / slug_of(name) for name in arguments.profiles}
    runners = {LABELS: Runner(config, next(iter(folders.values())), with_teacher=False)}
    runners |= {name: Runner(config, folder, with_teacher=True) for name, folder in folders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(arguments.rounds + 1):
        for name, runner in runners.items():
            seconds[name].append(runner.seconds(arguments.steps))
    measured = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    ratios = {
        name: sorted(labels / own for labels, own in zip(measured[LABELS], values, strict=True))
        for name, values in measured.items()
        if name != LABELS
    }
    rows = [
        [name, f"{statistics.median(values):.3f}, {values[0]:.2f} to {values[-1]:.2f}"]
        for name, values in ratios.items()
    ]
    result = {
        "config": str(arguments.config),
        "rounds": arguments.rounds,
        "steps_per_round": arguments.steps,
        "steps_per_s": {name: arguments.steps / statistics.median(values) for name, values in measured.items()},
        "speed_over_labels_alone": ratios,
        "environment": environment(),
        "markdown": text_table([["profile", "steps/s over those on the labels alone: median, min to max"], *rows]),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(result["markdown"])


if __name__ == "__main__":
    main()
