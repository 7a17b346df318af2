"""Settings of a sweep as text, and on an axis."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tristill.pipeline.report.drawing import plain
from tristill.pipeline.sweep.points import value_text
from tristill.pipeline.units import number, tick_text

_MOST_TICKS = 6
_LEAST_RATIO = 4


def setting_text(value: Any) -> str:
    """A setting in a cell or at a tick; a dash where there is none."""
    return "-" if value is None else value_text(value)


@dataclass(frozen=True)
class Scale:
    """Settings on an axis from 0 to 1: numbers by size, on a logarithmic scale if they lie evenly on one; else by name.

    numbers: whether all are numbers, so that an axis of numbers serves.
    """

    place: Callable[[Any], float]
    ticks: tuple[tuple[float, str], ...]
    has_numbers: bool = False
    is_log: bool = False

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Scale":
        """The scale on which all of these have a place."""
        numbers = [number(value) for value in values]
        if all(value is not None for value in numbers) and len(set(numbers)) > 1:
            return cls._of_numbers([value for value in numbers if value is not None])
        by_size = {
            setting_text(value): (found is not None, found or 0.0) for value, found in zip(values, numbers, strict=True)
        }
        names = sorted(by_size, key=lambda name: (*by_size[name], name))
        step = 1 / max(1, len(names) - 1)
        heights = {name: place * step if len(names) > 1 else 0.5 for place, name in enumerate(names)}
        return cls(
            lambda value: heights.get(setting_text(value), 0.5), tuple((h, plain(n)) for n, h in heights.items())
        )

    @classmethod
    def _of_numbers(cls, values: Sequence[float]) -> "Scale":
        is_log = is_logarithmic(values)
        form: Callable[[float], float] = math.log if is_log else float
        low, high = form(min(values)), form(max(values))

        def place(value: Any) -> float:
            found = number(value)
            return 0.5 if found is None or (is_log and found <= 0) else (form(found) - low) / (high - low)

        distinct = sorted(set(values))
        shown = distinct if len(distinct) <= _MOST_TICKS else _round_numbers(distinct, is_log=is_log)
        ticks: list[tuple[float, str]] = []
        for value in shown:
            if not ticks or place(value) - ticks[-1][0] > 0.07:
                ticks.append((place(value), tick_text(value)))
        return cls(place, tuple(ticks), has_numbers=True, is_log=is_log)


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether positive numbers lie more evenly by ratios than by differences, over a factor of 4 or more."""
    distinct = sorted(set(values))
    if distinct[0] <= 0 or distinct[-1] < _LEAST_RATIO * distinct[0]:
        return False
    return _unevenness([math.log(value) for value in distinct]) < _unevenness(distinct)


def _unevenness(ascending: Sequence[float]) -> float:
    """Mean distance of numbers from where they would lie if they were evenly spread, over their range."""
    low, span, last = ascending[0], ascending[-1] - ascending[0], len(ascending) - 1
    return sum(abs((value - low) / span - place / last) for place, value in enumerate(ascending)) / len(ascending)


def _round_numbers(ascending: Sequence[float], *, is_log: bool) -> list[float]:
    """Numbers for an axis of so many values: the ends, and round ones between them."""
    low, high = ascending[0], ascending[-1]
    if is_log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        candidates = [digit * 10.0**power for power in powers for digit in ((1, 2, 5) if high / low < 100 else (1,))]
    else:
        power = 10.0 ** math.floor(math.log10(high - low))
        step = next(part * power for part in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (part * power) <= _MOST_TICKS)
        candidates = [step * count for count in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return [low, *(value for value in candidates if low < value < high), high]
