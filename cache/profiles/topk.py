"""Profile `topk`: an adaptive head, and the tail's exact mass at declared temperatures; docs/format.md, section 4."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from tristill.cache.arrays import ArraySpec
from tristill.cache.coding.streams import Reading, Sink
from tristill.cache.profiles.head_needs import unserved_by_head
from tristill.cache.profiles.heads import HeadCoder, HeadSize, head_arrays, head_models, head_tables
from tristill.cache.profiles.profile import Coder, Need, Place, Profile, TailTreatment


def temperatures_in_order(temperatures: tuple[float, ...]) -> tuple[float, ...]:
    """The temperatures; a ValueError if they do not ascend."""
    if list(temperatures) != sorted(set(temperatures)):
        raise ValueError(f"temperatures must ascend and differ, found {list(temperatures)}")
    return temperatures


Temperatures = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1000)], ...],
    AfterValidator(temperatures_in_order),
    Field(min_length=1, max_length=8, description="temperatures, ascending, at which the tail's mass is exact"),
]


class TopKProfile(Profile):
    """The largest logits of each position, and how much lies outside; of what lies outside only the sum is known."""

    kind: Annotated[Literal["topk"], Field(description="name of the profile")] = "topk"
    head: Annotated[HeadSize, Field(description="which entries are kept")] = HeadSize()
    temperatures: Temperatures = (1.0,)
    tail: Annotated[
        Literal["bucket", "uniform", "nothing"],
        Field(
            description="what losses take the tail for: one bucket of exact mass; that mass spread evenly; or nothing, "
            "the head renormalised, for teachers of which no more is known (biased, and refused above temperature 1)"
        ),
    ] = "bucket"

    @model_validator(mode="after")
    def _serves_something(self) -> "TopKProfile":
        if self.tail == "nothing" and self.temperatures[-1] > 1:
            raise ValueError(
                f"tail 'nothing' serves no temperature above 1, found {list(self.temperatures)}; keep the tail's mass"
            )
        return self

    @property
    def temperature(self) -> float:
        """The lowest declared one."""
        return self.temperatures[0]

    @property
    def _num_tails(self) -> int:
        return 0 if self.tail == "nothing" else len(self.temperatures)

    def arrays(self, vocab_size: int, context_length: int) -> tuple[ArraySpec, ...]:
        """See head_arrays."""
        return head_arrays(self.head, self._num_tails, vocab_size, context_length)

    def tables(self, vocab_size: int) -> tuple[ArraySpec, ...]:
        """See head_tables."""
        return head_tables(self._num_tails, vocab_size)

    def models(self, vocab_size: int) -> dict[str, tuple[int, int]]:
        """See head_models."""
        return head_models(self.head, self._num_tails, vocab_size)

    @property
    def make_coder(self) -> Callable[[Mapping[str, np.ndarray]], Coder]:
        """A TopKCoder of this profile."""
        return partial(TopKCoder, self)

    def unserved(self, need: Need, vocab_size: int) -> str | None:
        """Declared temperatures only; without a tail, none above 1."""
        declared = () if self.tail == "nothing" else self.temperatures
        own: TailTreatment = "renormalise" if self.tail == "nothing" else self.tail
        about = f"its head of at most {self.head.max_entries} of {vocab_size} logits"
        return unserved_by_head(need, "topk", declared, own, about)


class TopKCoder:
    """Heads, and nothing else."""

    def __init__(self, profile: TopKProfile, tables: Mapping[str, np.ndarray]) -> None:
        self._heads = HeadCoder(tables, profile.head, len(tables.get("tail_predictor", ())))

    def write(self, arrays: Mapping[str, np.ndarray], place: Place, sink: Sink) -> None:
        """See Coder."""
        del place
        self._heads.write(arrays, sink)

    def read(self, place: Place) -> Reading[dict[str, np.ndarray]]:
        """See Coder."""
        return self._heads.read(place.num_positions)
