"""What a cache holds of one window, as plain values: ids, what the teacher gave the labels, and what it expected."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tristill.cache.distribution import largest_probabilities
from tristill.cache.reader import Cache, WindowBatch
from tristill.cache.spec import SplitName


@dataclass(frozen=True, slots=True)
class PeekedPosition:
    """One position.

    entropy_nats and label_probability: at tau_dump, to 1/16 nat; None where the cache knows neither. top: the ids with
    the largest probabilities that the cache knows, see largest_probabilities; empty where it knows nothing,
    as at a position that does not count.
    """

    position: int
    input_id: int
    label_id: int
    entropy_nats: float | None
    label_probability: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class PeekedWindow:
    """One window of T positions.

    ids: all T + 1. label_probabilities: what the teacher gave each label, T numbers; None where the cache does not
    know. positions: those that were asked for, more closely.
    """

    ids: list[int]
    label_probabilities: list[float | None]
    positions: list[PeekedPosition]


def peek(cache: Cache, split: SplitName, window: int, positions: range, num_top: int) -> PeekedWindow:
    """One window, and those of `positions` in it that it has, with the largest entries of each.

    Raises CacheRequestError for a split or window that is not there.
    """
    batch = cache.window(split, window)
    ids = [int(token_id) for token_id in batch.input_ids[0]]
    counts_T = np.ones(len(ids) - 1, bool) if batch.mask is None else batch.mask[0]
    label_log_probs = _signal(batch, "label_log_prob", counts_T)
    probabilities = [None if nats is None else math.exp(nats) for nats in label_log_probs]
    entropies = _signal(batch, "teacher_entropy", counts_T)
    rows = range(cache.spec.context_length)[positions.start : positions.stop : positions.step]
    closely = [
        PeekedPosition(t, ids[t], ids[t + 1], entropies[t], probabilities[t], top)
        for t, top in zip(rows, _largest(cache, batch, rows, counts_T, num_top), strict=True)
    ]
    return PeekedWindow(ids, probabilities, closely)


def _signal(batch: WindowBatch, name: str, counts_T: np.ndarray) -> list[float | None]:
    """One number a position; nothing is known where none counts, or the number is not finite."""
    if name not in batch.signals:
        return [None] * len(counts_T)
    known = zip(batch.signals[name][0], counts_T, strict=True)
    return [float(value) if counts and math.isfinite(value) else None for value, counts in known]


def _largest(
    cache: Cache, batch: WindowBatch, rows: Sequence[int], counts_T: np.ndarray, num_top: int
) -> list[list[tuple[int, float]]]:
    chosen = np.asarray([t for t in rows if counts_T[t]], dtype=int)
    if not len(chosen):
        return [[] for _ in rows]
    arrays = {name: array[0, chosen] for name, array in batch.target.items()}
    tables = cache.spec.target_part.own_tables(cache.tables)
    known = iter(largest_probabilities(cache.spec.profile, arrays, tables, batch.input_ids[0, chosen], num_top))
    return [next(known) if counts_T[t] else [] for t in rows]
