"""The seam between what is coded and how: integers go into a sink by their model's name, and come when asked for."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from tristill.cache.coding.frequencies import frequencies_from_counts
from tristill.cache.coding.integers import tokens_of

T = TypeVar("T")


class Sink(Protocol):
    """Takes integers: an encoder, or a histogram."""

    def write(self, name: str, values: np.ndarray, contexts: np.ndarray | int = 0) -> None:
        """Take `values` (n,) >= 0 for the model `name`, each in its context."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """The next `count` integers of the model `name`, each in its context, as `dtype`, which holds all of the model."""

    name: str
    count: int
    contexts: np.ndarray | int = 0
    dtype: type[np.signedinteger] = np.int64


Reading = Generator[Request, np.ndarray, T]
"""Asks for the integers that a sink took, in the same order, is sent those of each call, and returns what they mean.

A generator, so that readings of several chunks, which make the same calls, can be answered in step.
"""


class Histograms:
    """A sink that only counts tokens: models are fitted with it."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """`shapes`: contexts and tokens of every model."""
        self._counts = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}

    def write(self, name: str, values: np.ndarray, contexts: np.ndarray | int = 0) -> None:
        """Count."""
        counts = self._counts[name]
        places = np.asarray(contexts, np.int64) * counts.shape[1] + tokens_of(values)
        counts += np.bincount(places, minlength=counts.size).reshape(counts.shape)

    def frequencies(self) -> dict[str, np.ndarray]:
        """Models in proportion to the counts, (contexts, tokens) uint16 by name."""
        return {name: frequencies_from_counts(counts) for name, counts in self._counts.items()}
