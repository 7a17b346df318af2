"""What every profile says of itself, and how those that are entropy coded turn arrays into a payload and back.

Shapes: P windows, T positions of a window, N positions that count, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from tristill.cache.arrays import ArraySpec
from tristill.cache.coding.streams import Reading, Sink

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
    """Consecutive windows of a split: which positions there are to code, and what dither is seeded by.

    counts_PT: bool, the positions that count; None if all do. N of them.
    """

    split: str
    first_window: int
    num_windows: int
    context_length: int
    counts_PT: np.ndarray | None = field(default=None, compare=False)

    @property
    def num_positions(self) -> int:
        """N."""
        if self.counts_PT is None:
            return self.num_windows * self.context_length
        return int(np.count_nonzero(self.counts_PT))

    def strided(self, stride: int) -> "Place":
        """Positions 0, stride, 2 stride, .. of the same windows."""
        if stride == 1:
            return self
        counts = None if self.counts_PT is None else self.counts_PT[:, ::stride]
        return replace(self, context_length=-(-self.context_length // stride), counts_PT=counts)

    def gathered(self, array: np.ndarray) -> np.ndarray:
        """The positions that count, (N, ..), of an array (P, T, ..)."""
        flat = array.reshape(self.num_windows * self.context_length, *array.shape[2:])
        return flat if self.counts_PT is None else flat[self.counts_PT.ravel()]

    def scattered(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `gathered`, (P, T, ..): zero at the positions that do not count."""
        shape = (self.num_windows, self.context_length, *array.shape[1:])
        if self.counts_PT is None:
            return array.reshape(shape)
        whole = np.zeros(shape, array.dtype)
        whole[self.counts_PT] = array
        return whole


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
    """Arrays of the positions of one chunk to coded integers and back, with the tables of one cache."""

    def write(self, arrays: Mapping[str, np.ndarray], place: Place, sink: Sink) -> None:
        """Code the arrays (N, ..) of the positions of `place`, at least one."""
        ...

    def read(self, place: Place) -> Reading[dict[str, np.ndarray]]:
        """The arrays (N, ..) of the positions of `place`, as they were given up to the profile's own rounding."""
        ...


__all__ = ["NUM_LANES", "Coder", "Need", "Place", "Profile", "Sink", "TailTreatment"]
