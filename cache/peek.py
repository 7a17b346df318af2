"""What a cache holds of single positions, as plain values: ids, and what the teacher expected there."""

import math
from dataclasses import dataclass

import numpy as np

from cache.distribution import largest_probabilities
from cache.reader import Cache
from cache.spec import SplitName


@dataclass(frozen=True, slots=True)
class PeekedPosition:
    """One position.

    entropy_nats and label_probability: at tau_dump, to 1/16 nat; None if the cache has no signals. top: the ids with
    the largest probabilities that the cache knows, see largest_probabilities. Of a position that does not count, None
    and nothing.
    """

    position: int
    input_id: int
    label_id: int
    entropy_nats: float | None
    label_probability: float | None
    top: list[tuple[int, float]]


def peek(cache: Cache, split: SplitName, window: int, num_positions: int, num_top: int) -> list[PeekedPosition]:
    """The first positions of one window. Raises CacheRequestError for a split or window that is not there."""
    batch = cache.window(split, window)
    input_ids_T, label_ids_T = batch.input_ids[0, :-1], batch.input_ids[0, 1:]
    counts_T = np.ones(len(input_ids_T), bool) if batch.mask is None else batch.mask[0]
    counts_T = counts_T[:num_positions]
    arrays = {name: array[0, :num_positions][counts_T] for name, array in batch.target.items()}
    tables = cache.spec.target_part.own_tables(cache.tables)
    ids_N = input_ids_T[:num_positions][counts_T]
    known = largest_probabilities(cache.spec.profile, arrays, tables, ids_N, num_top) if len(ids_N) else iter(())
    return [
        PeekedPosition(
            position=t,
            input_id=int(input_ids_T[t]),
            label_id=int(label_ids_T[t]),
            entropy_nats=float(batch.signals["teacher_entropy"][0, t]) if counts and batch.signals else None,
            label_probability=math.exp(batch.signals["label_log_prob"][0, t]) if counts and batch.signals else None,
            top=next(known) if counts else [],
        )
        for t, counts in enumerate(counts_T.tolist())
    ]
