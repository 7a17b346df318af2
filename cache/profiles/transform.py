"""Profile `transform`: the whole logit vector, transform coded, beside an exact head; docs/format.md, section 4.

A position's logits, up to a constant, are mean + (table[input id] + step * coefficients) @ basis: the Karhunen-Loeve
basis of what the current token does not already say. Coefficients are rounded with subtractive dither and entropy
coded, each in the context of its own dither, which the reader knows (entropy-coded dithered quantisation: Ziv 1985;
Zamir and Feder 1992, IEEE Trans. Inf. Theory 38(2)).

Shapes: P windows, T positions, N positions that count, R coded coefficients, S basis vectors (S >= R), V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from tristill.cache.arrays import ArraySpec
from tristill.cache.coding.integers import columns, num_tokens, unzigzag, zigzag
from tristill.cache.coding.streams import Reading, Request, Sink
from tristill.cache.errors import CacheCorruptError
from tristill.cache.profiles.dither import LEVELS, dither_bytes, dither_of, undithered
from tristill.cache.profiles.head_needs import unserved_by_head
from tristill.cache.profiles.heads import HeadCoder, HeadSize, head_arrays, head_models, head_tables
from tristill.cache.profiles.profile import Coder, Need, Place, Profile
from tristill.cache.profiles.topk import Temperatures

LARGEST_COEFFICIENT = 2047
TABLE_UNITS_PER_STEP = 16
_DITHER_CONTEXTS = 8


class TransformProfile(Profile):
    """The full distribution at every temperature."""

    kind: Annotated[Literal["transform"], Field(description="name of the profile")] = "transform"
    step: Annotated[float, Field(gt=0, description="step of the coefficients, in nats of logit")]
    width: Annotated[int, Field(ge=1, description="D, width of the final hidden state that was encoded")]
    rank: Annotated[int, Field(ge=1, description="R, coefficients coded per position")]
    basis_rank: Annotated[int, Field(ge=1, description="S, basis vectors; those past R are used by the table alone")]
    head: Annotated[HeadSize, Field(description="which logits are kept exactly beside it")] = HeadSize()
    temperatures: Temperatures = (1.0,)
    dither: Annotated[bool, Field(description="subtractive dither, which makes the error independent of the logits")]
    seed: Annotated[int, Field(ge=0, description="seed of the dither, beside the position's place")] = 0

    @model_validator(mode="after")
    def _basis_holds_the_coefficients(self) -> "TransformProfile":
        if self.basis_rank < self.rank:
            raise ValueError(f"basis_rank ({self.basis_rank}) is below rank ({self.rank})")
        return self

    @property
    def temperature(self) -> float:
        """The lowest declared one."""
        return self.temperatures[0]

    def arrays(self, vocab_size: int, context_length: int) -> tuple[ArraySpec, ...]:
        """`coefficients` (T, R), in steps: given as they are, read back as rounded; and the head."""
        return (
            ArraySpec("coefficients", (context_length, self.rank), "<f2"),
            *head_arrays(self.head, len(self.temperatures), vocab_size, context_length),
        )

    def tables(self, vocab_size: int) -> tuple[ArraySpec, ...]:
        """What turns coefficients into logits, and final hidden states into coefficients.

        `mean` (V,) of the logits; `basis` (S, V) in units of `basis_scale` (S,); `table` (V, S) in sixteenths of a
        step. For who adds to the cache, `encoder` (D, R) and `encoder_mean` (D,): a final hidden state h has the
        coefficients (h - encoder_mean) @ encoder - table[input id], in steps.
        """
        return (
            ArraySpec("mean", (vocab_size,), "<f4"),
            ArraySpec("basis", (self.basis_rank, vocab_size), "<i2"),
            ArraySpec("basis_scale", (self.basis_rank,), "<f4"),
            ArraySpec("table", (vocab_size, self.basis_rank), "<i2"),
            ArraySpec("encoder", (self.width, self.rank), "<f4"),
            ArraySpec("encoder_mean", (self.width,), "<f4"),
            *head_tables(len(self.temperatures), vocab_size),
        )

    def models(self, vocab_size: int) -> dict[str, tuple[int, int]]:
        """Models of the head, and of every coefficient in every context."""
        contexts = self.rank * (_DITHER_CONTEXTS if self.dither else 1)
        return {
            "coefficient": (contexts, num_tokens(2 * LARGEST_COEFFICIENT + 2)),
            **head_models(self.head, len(self.temperatures), vocab_size),
        }

    @property
    def make_coder(self) -> Callable[[Mapping[str, np.ndarray]], Coder]:
        """A TransformCoder of this profile."""
        return partial(TransformCoder, self)

    def unserved(self, need: Need, vocab_size: int) -> str | None:
        """Everything is served: exact tail masses at the declared temperatures, interpolated ones between them.

        A loss that wants a tail treated otherwise has the head alone.
        """
        if need.tail is None:
            return None
        about = f"its head of at most {self.head.max_entries} of {vocab_size} logits"
        return unserved_by_head(need, "transform", self.temperatures, need.tail, about)


class TransformCoder:
    """Coefficients, one after the other, each for all positions; then the head."""

    def __init__(self, profile: TransformProfile, tables: Mapping[str, np.ndarray]) -> None:
        self._profile = profile
        self._heads = HeadCoder(tables, profile.head, len(profile.temperatures))

    def write(self, arrays: Mapping[str, np.ndarray], place: Place, sink: Sink) -> None:
        """See Coder. Rounds to even multiples of a step, dithered if the profile says so."""
        rank = self._profile.rank
        levels_NR = self._dither(place)
        scaled_NR = arrays["coefficients"].reshape(-1, rank).astype(np.float32)
        dithered_NR = scaled_NR if levels_NR is None else scaled_NR + dither_of(levels_NR)
        rounded_NR = np.rint(dithered_NR).clip(-LARGEST_COEFFICIENT, LARGEST_COEFFICIENT).astype(np.int64)
        for values_N, contexts in zip(rounded_NR.T.copy(), self._contexts(levels_NR), strict=True):
            sink.write("coefficient", zigzag(values_N), contexts)
        self._heads.write(arrays, sink)

    def read(self, place: Place) -> Reading[dict[str, np.ndarray]]:
        """See Coder."""
        levels_NR = self._dither(place)
        contexts_R = self._contexts(levels_NR)
        coded_NR = columns(place.num_positions, self._profile.rank)
        for k in range(self._profile.rank):
            coded_NR[:, k] = yield Request("coefficient", place.num_positions, contexts_R[k], np.int16)
        rounded_NR = unzigzag(np.ascontiguousarray(coded_NR))
        if np.abs(rounded_NR).max() > LARGEST_COEFFICIENT:
            raise CacheCorruptError(f"holds a coefficient beyond {LARGEST_COEFFICIENT} steps")
        head = yield from self._heads.read(place.num_positions)
        if levels_NR is None:
            return {"coefficients": rounded_NR.astype("<f2"), **head}
        return {"coefficients": undithered(rounded_NR, levels_NR), **head}

    def _dither(self, place: Place) -> np.ndarray | None:
        if not self._profile.dither:
            return None
        per_window = place.context_length * self._profile.rank
        levels = dither_bytes(self._profile.seed, place.split, place.first_window, place.num_windows, per_window)
        levels_PTR = levels.reshape(place.num_windows, place.context_length, self._profile.rank)
        return place.gathered(levels_PTR)

    def _contexts(self, levels_NR: np.ndarray | None) -> Sequence[np.ndarray | int]:
        """Of every coefficient."""
        rank = self._profile.rank
        if levels_NR is None:
            return range(rank)
        first_R = _DITHER_CONTEXTS * np.arange(rank, dtype=np.uint32)
        return list(np.ascontiguousarray(levels_NR.T) // (LEVELS // _DITHER_CONTEXTS) + first_R[:, None])
