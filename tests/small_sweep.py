"""What a sweep leaves, with no student trained."""

import math
from pathlib import Path
from typing import Any

from tristill.pipeline.sweep.results import Ledger, SeedGroup, SweepResults, Trial

LEDGER = Ledger(
    teacher_s=160.0,
    dump_s=72.0,
    cache_bytes=12_866_000,
    num_students=6,
    students_s=600.0,
    cached_step_s=0.36,
    online_step_s=0.47,
    online_over_cached=(1.3, 1.2, 1.4),
    offline_total_s=672.0,
    online_total_s=783.0,
    break_even_students=2.4,
)


def sweep_results(name: str = "small", text: str = "absmean", **changes: Any) -> SweepResults:
    """Seven students of two widths and two alphas; one was pruned. `text` is among the settings."""
    trials = [
        Trial(
            number=number,
            state="pruned" if number == 6 else "complete",
            parameters={"distill.alpha": alpha, "student.model.width": width, "student.quantize.weights": text},
            value=None if number == 6 else math.log(perplexity),
            validation={"perplexity": perplexity, "kl_to_teacher_nats": 0.5},
            train={"positions_per_s": 5000.0},
            model={"packed_bytes": 100 * width, "parameters": 1000 * width},
            cache_fingerprint="c6eeff40577b",
            folder=None,
            elapsed_s=100.0,
        )
        for number, (alpha, width, perplexity) in enumerate(
            [(0.1, 64, 90.0), (0.1, 128, 70.0), (0.5, 64, 95.0), (0.5, 128, 60.0), (0.9, 64, 99.0), (0.9, 128, 80.0),
             (0.9, 256, 50.0)]
        )
    ]  # fmt: skip
    found = SweepResults(
        name=name,
        cache_fingerprint="c6eeff40577b",
        metric="validation.loss_nats",
        varied=("distill.alpha", "student.model.width", "student.quantize.weights"),
        trials=tuple(trials),
        groups=(SeedGroup(parameters={"distill.alpha": 0.1}, trials=(0, 1), mean=4.4, deviation=0.02),),
        best=3,
        ledger=LEDGER,
    )
    return found.model_copy(update=changes)


def write_sweep(run_dir: Path, folder: str = "small", **settings: Any) -> None:
    """results.json as a sweep writes it."""
    path = run_dir / "sweeps" / folder / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(sweep_results(**settings).model_dump_json(), encoding="utf-8")
