"""What the recipe of the ternary literature does for the demo's student: several seeds, judged by the exact teacher.

    python -m benchmarks.recipe [--run-dir runs/demo] [--seeds 0 1 2] [--jobs 2] [--only NAME ..]

Needs a run with data, teacher and cache (`make dump-logits`). How students are trained, kept and judged:
benchmarks/students.py. Every student has the demo's shape, steps, batches, loss and cache; what differs is named in
RECIPES. At other budgets than the demo's the windows are as many times more, from a cache of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.students import METRICS, StudentTable, main


@dataclass(frozen=True)
class Recipe:
    """What differs from the demo: tables laid over its own.

    learning_rate: the peak over the demo's. warmup: share of the steps that quantisation is turned on in.
    """

    learning_rate: float = 1.0
    training: Mapping[str, Any] = field(default_factory=dict)
    quantize: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0.0
    subln: bool = False
    init: str = "random"


LINEAR = {"schedule": "linear", "final_lr_fraction": 0.0}
TWO_PHASES = {**LINEAR, "second_phase": {}}
DECAY_ENDS = {"weight_decay_until": 0.5}
BOTH = {**TWO_PHASES, **DECAY_ENDS}
RECIPES: dict[str, Recipe] = {
    "the demo's": Recipe(),
    "learning rate x2": Recipe(learning_rate=2.0),
    "two phases, linear": Recipe(training=TWO_PHASES),
    "decay off in the second half": Recipe(training=DECAY_ENDS),
    "two phases, decay off": Recipe(training=BOTH),
    "two phases, decay off, learning rate x2": Recipe(learning_rate=2.0, training=BOTH),
    "from the teacher's weights": Recipe(init="teacher"),
    "from the teacher's weights, two phases, decay off": Recipe(init="teacher", training=BOTH),
    "SubLN": Recipe(subln=True),
    "learning rate x4": Recipe(learning_rate=4.0),
    "learning rate x0.5": Recipe(learning_rate=0.5),
    "decay 0": Recipe(training={"weight_decay": 0.0}),
    "one phase, linear": Recipe(training=LINEAR),
    "two phases, cosine": Recipe(training={"second_phase": {}}),
    "two phases, decay off, learning rate x4": Recipe(learning_rate=4.0, training=BOTH),
    "weights: twn": Recipe(quantize={"weights": "twn"}),
    "weights: learned": Recipe(quantize={"weights": "learned"}),
    "weights: seq": Recipe(quantize={"weights": "seq"}),
    "scale per row": Recipe(quantize={"scale_per": "row"}),
    "scale per group of 256": Recipe(quantize={"scale_per": "group-256"}),
    "activations: none": Recipe(quantize={"activations": "none"}),
    "lambda warm-up, linear, a fifth": Recipe(warmup=0.2),
    "from the teacher's weights, lambda warm-up": Recipe(init="teacher", warmup=0.2),
}


def change(base: dict[str, Any], name: str) -> dict[str, Any]:
    """The config of a recipe."""
    recipe, training, student = RECIPES[name], base["distill"]["training"], base["student"]
    quantize = {**student["quantize"], **recipe.quantize}
    if recipe.warmup:
        quantize["warmup"] = {"kind": "linear", "steps": round(recipe.warmup * training["steps"])}
    shape = student["model"]
    if recipe.subln:
        shape = {**(shape or base["teacher"]["model"]), "subln": True}
    training = {**training, "learning_rate": recipe.learning_rate * training["learning_rate"], **recipe.training}
    return {
        **base,
        "distill": {**base["distill"], "training": training},
        "student": {**student, "model": shape, "quantize": quantize, "init": recipe.init},
    }


def cache_folder(run_dir: Path, name: str, budget: int) -> Path:
    """The run's own at the demo's budget; one for all recipes at another."""
    del name
    return run_dir / "cache" if budget == 1 else run_dir / "recipe-caches" / str(budget)


TABLE = StudentTable(
    name="recipe",
    heading="recipe",
    rows=tuple(RECIPES),
    change=change,
    cache_of=cache_folder,
    students="recipe-students",
    metrics=METRICS,
)

if __name__ == "__main__":
    main(TABLE, __doc__)
