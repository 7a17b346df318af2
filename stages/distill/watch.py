"""A look at a student while it trains."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Watch:
    """Held-out metrics every `every` steps, on the first `num_windows` windows of the validation split.

    report: called with the number of steps done and the metrics by name; it may raise to end the training there. A look
    changes nothing of what is trained, and its seconds are not counted among the training's.
    """

    every: int
    num_windows: int
    report: Callable[[int, dict[str, float | None]], None]
