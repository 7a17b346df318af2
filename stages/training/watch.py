"""Held-out metrics of a model while it trains, and where they part from the training loss."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

HELD_OUT = "held_out"
"""Key of a look's metrics in a record of `metrics.jsonl`."""
_LEAST_RISE, _LOOKS = 0.005, 2


@dataclass(frozen=True)
class Watch:
    """Held-out metrics every `every` steps, on the first `num_windows` windows of the validation split.

    report: called with the number of steps done and the metrics by name; it may raise to end the training there. A look
    changes nothing of what is trained, and its seconds are not counted among the training's.
    """

    every: int
    num_windows: int
    report: Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class Parting:
    """Where held-out text began to get worse while the training loss went on falling: overfitting.

    step: of the lowest held-out loss; two looks in a row after it are higher by half a per cent or more, and the mean
    training loss before the second of them is lower than before the lowest.
    """

    step: int
    lowest_nats: float
    last_step: int
    last_nats: float

    @property
    def text(self) -> str:
        """One sentence."""
        return (
            f"held-out loss rises while training loss falls: {self.lowest_nats:.4f} nats at step {self.step:,}, "
            f"{self.last_nats:.4f} at step {self.last_step:,} (overfitting); fewer steps, more text or more weight "
            "decay help"
        )


class PartingNote:
    """Looks for a parting, record by record, and finds the first one once."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        """`records`: those that a resumed training goes on from."""
        self._looks: list[tuple[int, float, float]] = []
        self._losses: list[float] = []
        self._train = math.inf
        self._is_found = False
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> Parting | None:
        """The parting that shows with this record; None if there is none, or it was found before."""
        looked = record.get(HELD_OUT)
        step, loss = _number(record.get("step")), _number(record.get("loss"))
        held_out = _number(looked.get("loss_nats")) if isinstance(looked, Mapping) else None
        if loss is not None:
            self._losses.append(loss)
        if step is None or held_out is None or self._is_found:
            return None
        if self._losses:  # else nothing was recorded since the last look, whose training loss is still the latest
            self._train, self._losses = statistics.fmean(self._losses), []
        self._looks.append((round(step), held_out, self._train))
        best, lowest, train = min(self._looks, key=lambda look: look[1])
        last = [look for look in self._looks if look[0] > best][-_LOOKS:]
        is_higher = len(last) == _LOOKS and all(look[1] > lowest * (1 + _LEAST_RISE) for look in last)
        self._is_found = is_higher and last[-1][2] < train
        return Parting(best, lowest, last[-1][0], last[-1][1]) if self._is_found else None


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else that a file may hold there."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None
