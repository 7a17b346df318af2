"""Codes the coefficients of hidden states (docs/format.md, section 6).

A position's *activity*, one of a few classes, is coded first; every coefficient then has a model per class, since a
position that is hard to predict in one coefficient is hard in all. It saves 2 to 4% at 5% relative error.

Shapes: N kept positions of a chunk, R coefficients of a position.
"""

from collections.abc import Mapping

import numpy as np

from tristill.cache.coding.integers import columns, num_tokens, unzigzag, zigzag
from tristill.cache.coding.streams import Reading, Request, Sink
from tristill.cache.errors import CacheCorruptError, CacheRequestError
from tristill.cache.profiles.profile import Place

LARGEST_COEFFICIENT = 2047


def coefficient_models(rank: int, num_activities: int) -> dict[str, tuple[int, int]]:
    """Contexts and tokens of the models of a layer."""
    return {
        "activity": (1, num_activities),
        "coefficient": (rank * num_activities, num_tokens(2 * LARGEST_COEFFICIENT)),
    }


class HiddenCoder:
    """Activities of all positions; then the coefficients, one after the other, each for all positions."""

    def __init__(self, name: str, rank: int, num_activities: int, tables: Mapping[str, np.ndarray]) -> None:
        """`name` is that of the array of coefficients. A layer's tables hold `activity_edges`, ascending."""
        self._name = name
        self._rank = rank
        self._num_activities = num_activities
        self._edges = tables["activity_edges"]

    def write(self, arrays: Mapping[str, np.ndarray], place: Place, sink: Sink) -> None:
        """See Coder. The activity of a position is the number of edges that its sum of |q| reaches."""
        del place
        coefficients_RN = arrays[self._name].reshape(-1, self._rank).T.astype(np.int64, order="C")
        largest = int(np.abs(coefficients_RN).max(initial=0))
        if largest > LARGEST_COEFFICIENT:
            raise CacheRequestError(
                f"{self._name}: found a coefficient of {largest} steps, expected at most {LARGEST_COEFFICIENT}; clip "
                "it, or choose a larger step"
            )
        activity_N = np.searchsorted(self._edges, np.abs(coefficients_RN).sum(axis=0), side="right")
        sink.write("activity", activity_N)
        for r in range(self._rank):
            sink.write("coefficient", zigzag(coefficients_RN[r]), activity_N + self._num_activities * r)

    def read(self, place: Place) -> Reading[dict[str, np.ndarray]]:
        """See Coder."""
        count = place.num_positions
        activity_N = (yield Request("activity", count)).astype(np.uint32)
        coded_NR = columns(count, self._rank)
        for r in range(self._rank):
            contexts_N = activity_N + self._num_activities * r
            coded_NR[:, r] = yield Request("coefficient", count, contexts_N, np.int16)
        coefficients_NR = unzigzag(np.ascontiguousarray(coded_NR))
        if np.abs(coefficients_NR).max() > LARGEST_COEFFICIENT:
            raise CacheCorruptError(f"holds a coefficient beyond {LARGEST_COEFFICIENT} steps")
        return {self._name: coefficients_NR}


def activity_edges(coefficients_NR: np.ndarray, num_activities: int) -> np.ndarray:
    """Edges that put about equally many of these positions into every class, int32 ascending."""
    sums_N = np.abs(coefficients_NR.astype(np.int64)).sum(axis=1)
    edges: np.ndarray = np.quantile(sums_N, np.arange(1, num_activities) / num_activities).round().astype("<i4")
    return edges
