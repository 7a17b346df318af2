"""What every profile says of itself, and how those that are entropy coded turn arrays into a payload and back.

Shapes: P windows, T positions of a window, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from cache.arrays import ArraySpec
from cache.coding.streams import Sink, Source

NUM_LANES = 1024
"""Lanes of the entropy coder; their states take 4 bytes each in every chunk."""


TailTreatment = Literal["bucket", "renormalise", "zero", "uniform", "sampled"]


@dataclass(frozen=True, slots=True)
class Need:
    """What a loss asks of the teacher's distribution.

    until: where the temperature goes during training, through everything between; None if it stays. tail: how the loss
    takes what lies outside the head; None for what the profile knows best.
    """

    divergence: str
    temperature: float
    until: float | None = None
    tail: TailTreatment | None = None

    @property
    def temperatures(self) -> str:
        """In words."""
        if self.until is None:
            return f"temperature {self.temperature:g}"
        return f"every temperature between {self.temperature:g} and {self.until:g}"

    @property
    def highest(self) -> float:
        """The highest temperature."""
        return max(self.temperature, self.until or self.temperature)


@dataclass(frozen=True, slots=True)
class Place:
    """Consecutive windows of a split: how many positions there are to code, and what dither is seeded by."""

    split: str
    first_window: int
    num_windows: int
    context_length: int

    @property
    def num_positions(self) -> int:
        """N = P T."""
        return self.num_windows * self.context_length

    def shaped(self, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays (N, ..) as (P, T, ..)."""
        return {
            name: array.reshape(self.num_windows, self.context_length, *array.shape[1:]) for name, array in flat.items()
        }


class Profile(BaseModel, ABC):
    """Base of all profiles. A profile without `models` stores its arrays as they are.

    Each has a `temperature`, tau_dump: stored logits are divided by it, and draws, entropies and probabilities of
    labels are taken at it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    since_version: ClassVar[int] = 2

    @abstractmethod
    def arrays(self, vocab_size: int, context_length: int) -> tuple[ArraySpec, ...]:
        """What a writer is given and a reader gives back, per window."""

    @abstractmethod
    def unserved(self, need: Need, vocab_size: int) -> str | None:
        """Why a loss cannot have from what is stored what it needs; None when it can."""

    def tables(self, vocab_size: int) -> tuple[ArraySpec, ...]:
        """Arrays that are stored once for the whole cache, other than the models."""
        del vocab_size
        return ()

    def models(self, vocab_size: int) -> dict[str, tuple[int, int]]:
        """Contexts and tokens of every model of the entropy coder, by name; empty if the arrays are stored plain."""
        del vocab_size
        return {}

    @property
    def make_coder(self) -> Callable[[Mapping[str, np.ndarray]], "Coder"] | None:
        """What makes a coder from the tables of a cache; None if the arrays are stored plain."""
        return None


class Coder(Protocol):
    """Arrays of one chunk to coded integers and back, with the tables of one cache."""

    def write(self, arrays: Mapping[str, np.ndarray], place: Place, sink: Sink) -> None:
        """Code the arrays of consecutive windows."""
        ...

    def read(self, source: Source, place: Place) -> dict[str, np.ndarray]:
        """The arrays of the windows of `place`, as they were given up to the profile's own rounding."""
        ...


__all__ = ["NUM_LANES", "Coder", "Need", "Place", "Profile", "Sink", "Source", "TailTreatment"]
