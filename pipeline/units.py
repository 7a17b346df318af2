"""Numbers as people read them."""

import math
from typing import Any

_BINARY = ("bytes", "KiB", "MiB", "GiB", "TiB")
_THOUSANDS = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"))


def bytes_text(num_bytes: float) -> str:
    """Binary units: 1.4 MiB."""
    size, unit = float(num_bytes), 0
    while size >= 1024 and unit + 1 < len(_BINARY):
        size, unit = size / 1024, unit + 1
    return f"{size:,.0f} {_BINARY[unit]}" if unit == 0 or size >= 100 else f"{size:.3g} {_BINARY[unit]}"


def seconds_text(seconds: float) -> str:
    """45 s, 3.2 min, 5.1 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count_text(count: float) -> str:
    """1.23 million; in full below that."""
    size, name = scale_of(count)
    return f"{count / size:.3g} {name}" if size >= 1e6 else f"{count:,.0f}"


def scale_of(largest: float) -> tuple[float, str]:
    """(divisor, word) that make numbers up to `largest` short."""
    return next(((size, name) for size, name in _THOUSANDS if largest >= size), (1.0, ""))


def number(value: Any) -> float | None:
    """A finite number, or None for anything else that a file may hold there."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def cell(value: Any, form: str) -> str:
    """The number in this form, or a dash."""
    found = number(value)
    return "-" if found is None else form.format(found)


def tick_text(value: float) -> str:
    """A number on an axis: 0.01, 5, 2,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
