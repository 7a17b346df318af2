"""Strategies of hypothesis that change plain values, as a damaged or hostile file holds them."""

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if depth % 2 else {"kind": value}
    return value


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**32, 2**63 - 1, 2**64, 10**18, 10**300]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["train", "../x", "/etc/passwd", "topk", "transform", "\u0000", "1e999", "a" * 64]),
    st.lists(st.integers(-3, 9), max_size=4),
    st.dictionaries(st.text(max_size=6), st.integers(-3, 9), max_size=3),
    st.integers(1, 200).map(_nested),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in items for place in places(part, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, original: dict[str, Any]) -> Any:
    """The value with one to three places replaced, taken away, added to, or exchanged for another place's."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        inside = [place for place in places(value) if place]
        if not inside:
            break
        *parents, last = draw(st.sampled_from(inside))
        holder = value
        for key in parents:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "exchange"]))
        if how == "delete":
            del holder[last]
        elif how == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = draw(ODD_VALUES)
        elif how == "exchange":
            other: Any = original
            for key in draw(st.sampled_from(places(original))):
                other = other[key]
            holder[last] = copy.deepcopy(other)
        else:
            holder[last] = draw(ODD_VALUES)
    return value


@st.composite
def edited(draw: st.DrawFn, original: bytes) -> bytes:
    """The bytes with one to four places overwritten, cut out or doubled; or any bytes at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    content = original
    for _ in range(draw(st.integers(1, 4))):
        at, size = draw(st.integers(0, max(0, len(content) - 1))), draw(st.integers(0, 12))
        new = draw(st.one_of(st.binary(max_size=8), st.just(content[at : at + size] * 2), st.just(b"")))
        content = content[:at] + new + content[at + size :]
    return content


def fuzz(check: Callable[[Any], None], strategy: st.SearchStrategy[Any], num_cases: int) -> None:
    """Run a check on so many values, the same ones each time."""
    settings(max_examples=num_cases, deadline=None, database=None, derandomize=True)(given(strategy)(check))()
