"""What a sweep varies, as points: each a value for every dotted key; with a seed they are a student's parameters."""

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tristill.cache.hashing import fingerprint_of
from tristill.pipeline.sweep.config import SEED, Range, SweepConfig, Varied

Point = dict[str, Any]


def grid(sweep: SweepConfig) -> Iterator[Point]:
    """Every combination, the last key varying fastest. Ranges without a step must not be there."""
    choices = [_values(varied) for varied in sweep.vary.values()]
    for combination in itertools.product(*choices):
        yield dict(zip(sweep.vary, combination, strict=True))


def examples(sweep: SweepConfig) -> Iterator[Point]:
    """Points in which every value of a list, and a few of every range, stand at least once."""
    tried = {key: _values(varied) or list(_some(varied)) for key, varied in sweep.vary.items()}
    first = {key: values[0] for key, values in tried.items()}
    yield first
    for key, values in tried.items():
        yield from ({**first, key: value} for value in values[1:])


def with_seeds(point: Point, sweep: SweepConfig) -> list[Point]:
    """The parameters of a point's students."""
    return [{**point, SEED: seed} for seed in sweep.seeds] or [point]


def without_seed(parameters: Point, sweep: SweepConfig) -> Point:
    """The point of a student."""
    return {key: value for key, value in parameters.items() if key in sweep.vary}


def folder_name(parameters: Point) -> str:
    """A short name that is a function of the parameters."""
    return fingerprint_of(parameters)[:12]


def in_words(parameters: Mapping[str, Any]) -> str:
    """Parameters by the ends of their keys: `alpha 0.2, temperature 2`."""
    titles = short_keys(list(parameters))
    return ", ".join(f"{titles[key]} {value_text(value)}" for key, value in parameters.items())


def short_keys(keys: list[str]) -> dict[str, str]:
    """The last words of dotted keys, as many as it takes to tell them apart."""
    short = {}
    for key in keys:
        words = key.split(".")
        ends = (".".join(words[-count:]) for count in range(1, len(words)))
        others = [other for other in keys if other != key]
        short[key] = next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), key)
    return short


def value_text(value: Any) -> str:
    """A value in a table: numbers with four digits, and what is not plain as JSON."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _values(varied: Varied) -> list[Any]:
    return (varied.values() or []) if isinstance(varied, Range) else list(varied)


def _some(varied: Varied) -> list[Any]:
    return varied.some() if isinstance(varied, Range) else list(varied)
