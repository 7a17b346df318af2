"""Settings of a sweep as text, and on an axis."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.drawing import plain
from pipeline.sweep.points import value_text
from pipeline.units import number, tick_text


def setting_text(value: Any) -> str:
    """A setting in a cell or at a tick; a dash where there is none."""
    return "-" if value is None else value_text(value)


@dataclass(frozen=True)
class Scale:
    """Settings on an axis from 0 to 1: numbers by size, anything else by name."""

    place: Callable[[Any], float]
    ticks: tuple[tuple[float, str], ...]
    note: str = ""

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Scale":
        """The scale on which all of these have a place."""
        numbers = [number(value) for value in values]
        if all(value is not None for value in numbers) and len(set(numbers)) > 1:
            return cls._of_numbers([value for value in numbers if value is not None])
        names = sorted({setting_text(value) for value in values})
        step = 1 / max(1, len(names) - 1)
        heights = {name: place * step if len(names) > 1 else 0.5 for place, name in enumerate(names)}
        return cls(
            lambda value: heights.get(setting_text(value), 0.5), tuple((h, plain(n)) for n, h in heights.items())
        )

    @classmethod
    def _of_numbers(cls, values: Sequence[float]) -> "Scale":
        is_log = min(values) > 0 and max(values) / min(values) >= 20
        form: Callable[[float], float] = math.log if is_log else float
        low, high = form(min(values)), form(max(values))

        def place(value: Any) -> float:
            found = number(value)
            return 0.5 if found is None or (is_log and found <= 0) else (form(found) - low) / (high - low)

        distinct = sorted(set(values))
        shown = distinct if len(distinct) <= 5 else [distinct[round(i * (len(distinct) - 1) / 4)] for i in range(5)]
        ticks: list[tuple[float, str]] = []
        for value in shown:
            if not ticks or place(value) - ticks[-1][0] > 0.07:
                ticks.append((place(value), tick_text(value)))
        return cls(place, tuple(ticks), " The axis is logarithmic." if is_log else "")
