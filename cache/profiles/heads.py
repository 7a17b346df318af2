"""Codes heads: for each position a few ids with their logits, and the log-mass of the tail at declared temperatures.

Shapes: N positions, K largest number of entries, M temperatures, E entries of all positions, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tristill.cache.arrays import ArraySpec, ids_dtype
from tristill.cache.coding.integers import num_tokens, unzigzag, zigzag
from tristill.cache.coding.streams import Reading, Request, Sink
from tristill.cache.errors import CacheCorruptError

GAP_STEP = 0.1
"""Nats between neighbouring values of the grid of gaps, at a gap of zero."""
GAP_GROWTH = 0.06
"""By how much that step grows per nat of gap."""
NUM_GAPS = 128
TAIL_STEP = 1 / 32
TAIL_LIMIT = 60.0
_TAIL_BOUND = round(TAIL_LIMIT / TAIL_STEP)
_COUNT_CONTEXTS = 16
_PLACE_CONTEXTS = 8
LARGEST_HEAD = 255


class HeadSize(BaseModel):
    """Which entries a position keeps: those of probability `probability` or more, within bounds on their number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    probability: Annotated[
        float, Field(ge=0, le=1, description="an entry is kept if its probability at the first temperature is this")
    ] = 0.02
    min_entries: Annotated[int, Field(ge=1, le=LARGEST_HEAD, description="entries kept at least")] = 1
    max_entries: Annotated[int, Field(ge=1, le=LARGEST_HEAD, description="entries kept at most")] = 24

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "HeadSize":
        if self.min_entries > self.max_entries:
            raise ValueError(f"min_entries ({self.min_entries}) is above max_entries ({self.max_entries})")
        return self

    def checked(self, vocab_size: int) -> "HeadSize":
        """Itself; refuses more entries than the vocabulary has."""
        if self.max_entries > vocab_size:
            raise ValueError(
                f"head.max_entries is {self.max_entries}, but the vocabulary has only {vocab_size} entries; set "
                f"cache.profile.head.max_entries to {vocab_size} or less"
            )
        return self


def head_arrays(size: HeadSize, num_temperatures: int, vocab_size: int, context_length: int) -> tuple[ArraySpec, ...]:
    """Arrays of a head and its tail; entries past the count repeat the first one.

    A writer gives the largest logit first. A reader gets entries in the order of the ids' ranks in the table.
    """
    entries = (context_length, size.checked(vocab_size).max_entries)
    tail = (ArraySpec("tail_logsumexp", (context_length, num_temperatures), "<f2"),) if num_temperatures else ()
    return (
        ArraySpec("head_count", (context_length,), "|u1"),
        ArraySpec("head_ids", entries, ids_dtype(vocab_size)),
        ArraySpec("head_logits", entries, "<f2"),
        *tail,
    )


def head_tables(num_temperatures: int, vocab_size: int) -> tuple[ArraySpec, ...]:
    """`ids_by_rank`: all ids, the most frequent first. `tail_predictor`: see HeadCoder."""
    tail = (ArraySpec("tail_predictor", (num_temperatures, 3), "<i4"),) if num_temperatures else ()
    return (ArraySpec("ids_by_rank", (vocab_size,), ids_dtype(vocab_size)), *tail)


def head_models(size: HeadSize, num_temperatures: int, vocab_size: int) -> dict[str, tuple[int, int]]:
    """Models of counts, ids, gaps and tails."""
    shapes = {
        "head_count": (1, num_tokens(size.max_entries)),
        "head_id": (_COUNT_CONTEXTS * _PLACE_CONTEXTS, num_tokens(vocab_size)),
        "head_gap": (_COUNT_CONTEXTS, num_tokens(NUM_GAPS - 1)),
    }
    if num_temperatures:
        shapes["tail"] = (num_temperatures * _COUNT_CONTEXTS, num_tokens(8 * _TAIL_BOUND))
    return shapes


def gap_indices(gaps: np.ndarray) -> np.ndarray:
    """Places of gaps >= 0 on the grid, int64: round(log(1 + growth / step * gap) / growth), the last for all beyond."""
    places = np.rint(np.log1p(gaps.astype(np.float64) * (GAP_GROWTH / GAP_STEP)) / GAP_GROWTH)
    return np.minimum(places, NUM_GAPS - 1).astype(np.int64)


def gap_grid() -> np.ndarray:
    """The gaps of all places, (128,) float32: step / growth * (exp(growth * place) - 1), up to 3400 nats."""
    gaps: np.ndarray = (GAP_STEP / GAP_GROWTH * np.expm1(GAP_GROWTH * np.arange(NUM_GAPS))).astype(np.float32)
    return gaps


@dataclass(frozen=True)
class RaggedIds:
    """Sets of ids, one per position, as increasing ranks; E entries, those of a position next to one another."""

    counts_N: np.ndarray
    ranks_E: np.ndarray

    def write(self, name: str, sink: Sink) -> None:
        """Code the ranks as differences; the counts are known to the reader."""
        position_E, place_E = places_of(self.counts_N)
        before_E = np.concatenate([[-1], self.ranks_E[:-1]])
        before_E = np.where(place_E == 0, -1, before_E)
        sink.write(name, self.ranks_E - before_E - 1, id_contexts(self.counts_N[position_E], place_E))

    @classmethod
    def read(cls, name: str, counts_N: np.ndarray, position_E: np.ndarray, place_E: np.ndarray) -> Reading["RaggedIds"]:
        """The inverse of `write`; with the `places_of` the counts."""
        steps_E = (yield Request(name, len(position_E), id_contexts(counts_N[position_E], place_E))) + 1
        sums_E = np.cumsum(steps_E)
        first_N = np.cumsum(counts_N) - counts_N
        base_N = np.concatenate([[0], sums_E])[first_N]
        return cls(counts_N, sums_E - base_N[position_E] - 1)


def places_of(counts_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(position_E, place_E): which position each entry belongs to, and its place there."""
    position_E = np.repeat(np.arange(len(counts_N)), counts_N)
    first_N = np.cumsum(counts_N) - counts_N
    return position_E, np.arange(len(position_E)) - first_N[position_E]


def id_contexts(counts_E: np.ndarray, place_E: np.ndarray) -> np.ndarray:
    """The context of a rank: how many entries the position has, and which of them this is."""
    count_E = np.minimum(counts_E - 1, _COUNT_CONTEXTS - 1)
    contexts_E: np.ndarray = count_E * _PLACE_CONTEXTS + np.minimum(place_E, _PLACE_CONTEXTS - 1)
    return contexts_E


class IdRanks:
    """Ids to ranks by frequency and back. Raises CacheCorruptError if the table is no permutation."""

    def __init__(self, ids_by_rank: np.ndarray) -> None:
        self.ids_by_rank = ids_by_rank
        self.ranks = np.full(len(ids_by_rank), -1, np.int64)
        if ids_by_rank.max() < len(ids_by_rank):
            self.ranks[ids_by_rank] = np.arange(len(ids_by_rank))
        if (self.ranks < 0).any():
            raise CacheCorruptError("the table ids_by_rank is no permutation of the vocabulary")

    def ids(self, ranks: np.ndarray) -> np.ndarray:
        """Ids of ranks; refuses ranks beyond the vocabulary, which only damaged data holds."""
        if len(ranks) and ranks.max() >= len(self.ids_by_rank):
            raise CacheCorruptError(f"holds id rank {ranks.max()}, expected ranks below {len(self.ids_by_rank)}")
        ids: np.ndarray = self.ids_by_rank[ranks]
        return ids


class HeadCoder:
    """Heads of N positions to integers and back.

    A tail is coded as t_m = round(32 log-mass) for every temperature, the highest first, as the difference from
    (a t_before + b t_before_that + c) >> 16, with a, b, c of `tail_predictor`.
    """

    def __init__(self, tables: Mapping[str, np.ndarray], size: HeadSize, num_temperatures: int) -> None:
        self._ids = IdRanks(tables["ids_by_rank"])
        self._bounds = (size.min_entries, size.max_entries)
        self._max_entries = size.max_entries
        self._num_temperatures = num_temperatures
        self._predictor = tables["tail_predictor"].astype(np.int64) if num_temperatures else np.zeros((0, 3), np.int64)
        self._gaps = -gap_grid()

    def write(self, arrays: Mapping[str, np.ndarray], sink: Sink) -> None:
        """Code arrays of head_arrays, (P, T, ..)."""
        counts_N = arrays["head_count"].ravel().astype(np.int64)
        kept_NK = np.arange(self._max_entries) < counts_N[:, None]
        ranks_NK = self._ids.ranks[arrays["head_ids"].reshape(-1, self._max_entries)]
        order_NK = np.argsort(np.where(kept_NK, ranks_NK, np.iinfo(np.int64).max), axis=1)
        ranks_E = np.take_along_axis(ranks_NK, order_NK, axis=1)[kept_NK]
        gaps_NK = gap_indices(-np.minimum(arrays["head_logits"].reshape(-1, self._max_entries), 0))
        gaps_NK[:, 1:] = np.maximum(gaps_NK[:, 1:], 1)  # the first given is the largest, and stays the only largest
        gaps_E = np.take_along_axis(gaps_NK, order_NK, axis=1)[kept_NK]
        sink.write("head_count", counts_N)
        RaggedIds(counts_N, ranks_E).write("head_id", sink)
        count_context_N = np.minimum(counts_N, _COUNT_CONTEXTS) - 1
        sink.write("head_gap", gaps_E, np.repeat(count_context_N, counts_N))
        if self._num_temperatures:
            log_mass_NM = arrays["tail_logsumexp"].reshape(-1, self._num_temperatures).astype(np.float64)
            steps_NM = np.rint(log_mass_NM.clip(-TAIL_LIMIT, TAIL_LIMIT) / TAIL_STEP).astype(np.int64)
            for m, predicted_N, context_N in self._tail_predictions(steps_NM, count_context_N):
                sink.write("tail", zigzag(steps_NM[:, m] - predicted_N), context_N)

    def read(self, num_positions: int) -> Reading[dict[str, np.ndarray]]:
        """The arrays, (N, ..)."""
        counts_N = yield Request("head_count", num_positions)
        smallest, largest = self._bounds
        if counts_N.min() < smallest or counts_N.max() > largest:
            raise CacheCorruptError(
                f"holds heads of {counts_N.min()} to {counts_N.max()} entries, expected {smallest} to {largest}"
            )
        position_E, place_E = places_of(counts_N)
        ragged = yield from RaggedIds.read("head_id", counts_N, position_E, place_E)
        count_context_N = np.minimum(counts_N, _COUNT_CONTEXTS) - 1
        gaps_E = yield Request("head_gap", len(position_E), count_context_N[position_E])
        arrays = {
            "head_count": counts_N.astype(np.uint8),
            "head_ids": padded(self._ids.ids(ragged.ranks_E), counts_N, position_E, place_E, self._max_entries),
            "head_logits": padded(self._gaps[gaps_E].astype("<f2"), counts_N, position_E, place_E, self._max_entries),
        }
        if self._num_temperatures:
            steps_NM = np.zeros((num_positions, self._num_temperatures), np.int64)
            for m, predicted_N, context_N in self._tail_predictions(steps_NM, count_context_N):
                coded_N = yield Request("tail", num_positions, context_N)
                steps_NM[:, m] = predicted_N + unzigzag(coded_N)
            if np.abs(steps_NM).max() > _TAIL_BOUND:
                raise CacheCorruptError(f"holds a tail beyond {TAIL_LIMIT} nats")
            log_mass_NM = (steps_NM * TAIL_STEP).astype("<f2")
            arrays["tail_logsumexp"] = np.where(steps_NM == -_TAIL_BOUND, np.float16(-np.inf), log_mass_NM)
        return arrays

    def _tail_predictions(
        self, steps_NM: np.ndarray, count_context_N: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(m, predicted steps, contexts), the highest temperature first; looks at the columns filled so far."""
        for place, m in enumerate(range(self._num_temperatures - 1, -1, -1)):
            a, b, c = (int(value) for value in self._predictor[m])
            predicted_N = np.full(len(steps_NM), c, np.int64)
            if place >= 1:
                predicted_N += a * steps_NM[:, m + 1]
            if place >= 2:
                predicted_N += b * steps_NM[:, m + 2]
            predicted_N = np.clip(predicted_N >> 16, -_TAIL_BOUND, _TAIL_BOUND)
            yield m, predicted_N, m * _COUNT_CONTEXTS + np.maximum(count_context_N, 0)


def padded(
    values_E: np.ndarray, counts_N: np.ndarray, position_E: np.ndarray, place_E: np.ndarray, width: int
) -> np.ndarray:
    """(N, width) of ragged values; past its count a row repeats its first value, and an empty row holds zeros."""
    first_N = np.minimum(np.cumsum(counts_N) - counts_N, max(len(values_E) - 1, 0))
    starts_N = np.where(counts_N > 0, values_E[first_N], 0) if len(values_E) else np.zeros(len(counts_N))
    rows_NK = np.repeat(starts_N.astype(values_E.dtype)[:, None], width, axis=1)
    rows_NK[position_E, place_E] = values_E
    return rows_NK


def fit_tail_predictor(log_mass_NM: np.ndarray) -> np.ndarray:
    """`tail_predictor` by least squares on a sample, (M, 3) int32 in units of 1 / 65536."""
    steps_NM = np.rint(log_mass_NM.astype(np.float64).clip(-TAIL_LIMIT, TAIL_LIMIT) / TAIL_STEP)
    num_temperatures = steps_NM.shape[1]
    table = np.zeros((num_temperatures, 3), "<i4")
    for place, m in enumerate(range(num_temperatures - 1, -1, -1)):
        known = [steps_NM[:, m + 1 + j] for j in range(min(place, 2))]
        design = np.stack([*known, np.ones(len(steps_NM))])
        # Sums of whole numbers below 2^53 are exact in any order, so that any machine finds the same.
        normal = np.array([[(one * other).sum() for other in design] for one in design])
        normal += 1e-3 * np.eye(len(design))
        weights = np.linalg.solve(normal, np.array([(one * steps_NM[:, m]).sum() for one in design]))
        scaled = np.rint(np.clip(weights * 65536, -(2**31) + 1, 2**31 - 1)).astype("<i4")
        table[m, : len(known)], table[m, 2] = scaled[:-1], scaled[-1]
    return table
