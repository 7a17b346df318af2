"""What distillation methods make of the demo's student: several seeds, two budgets, judged by the exact teacher.

    python -m benchmarks.methods [--run-dir runs/demo] [--seeds 0 1 2] [--budget 1] [--jobs 2] [--only NAME ..]

How students are trained, kept and judged: benchmarks/students.py. Every student has the demo's shape, steps times the
budget, learning rate and batches; what differs is named in METHODS. Caches hold as many windows as the budget sees,
once. Speeds are those of one thread, comparable with one another and low.
"""

from pathlib import Path
from typing import Any

from benchmarks.students import METRICS, StudentTable, main

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


def change(base: dict[str, Any], method: str) -> dict[str, Any]:
    """The config of a method."""
    changes = METHODS[method]
    distill = dict(changes["distill"])
    if "losses" in distill:
        labels = {"kind": "cross_entropy", "weight": ALPHA}
        distill["losses"] = [labels, {"kind": distill["losses"], "weight": 1 - ALPHA}]
    return {
        **base,
        "cache": {**base["cache"], **changes.get("cache", {})},
        "distill": {**base["distill"], "alpha": None, **distill},
        "student": {**base["student"], **changes.get("student", {})},
    }


def cache_folder(run_dir: Path, method: str, budget: int) -> Path:
    """Methods of equal caches share one."""
    own = METHODS[method].get("cache", {})
    kind = "hidden" if "hidden_layers" in own else own.get("profile", {}).get("kind", "transform")
    return run_dir / "method-caches" / f"{kind}-{budget}"


TABLE = StudentTable(
    name="methods",
    heading="method",
    rows=tuple(METHODS),
    change=change,
    cache_of=cache_folder,
    students="method-students",
    metrics={**METRICS, "positions_per_s": ("positions/s", 1, 0)},
)

if __name__ == "__main__":
    main(TABLE, __doc__)
