"""How much of the teacher's probability a cache holds in single entries, and how sure the teacher was, by a sample."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tristill.cache.distribution import Head
from tristill.cache.reader import Cache
from tristill.cache.spec import SplitName

MAX_CHUNKS = 64
_MASS_BINS = 10


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of positions between neighbouring edges; the last bin holds its upper edge too."""

    edges: list[float]
    counts: list[int]
    mean: float

    @classmethod
    def of(cls, values: np.ndarray, edges: np.ndarray) -> "Histogram":
        """All values counted: those beyond the edges in the bins at the ends."""
        counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
        return cls(edges.tolist(), counts.tolist(), float(values.mean()))


@dataclass(frozen=True, slots=True)
class Sample:
    """Histograms over some chunks of a split, at tau_dump.

    head_mass: None if the profile has no head, or nothing is known outside it. entropy_nats: None if the cache has no
    signals.
    """

    split: SplitName
    chunks: int
    positions: int
    head_mass: Histogram | None
    entropy_nats: Histogram | None


def sample(cache: Cache, max_chunks: int = MAX_CHUNKS) -> Sample:
    """Reads at most `max_chunks` chunks, spread evenly over the train split, or the only split there is."""
    spec = cache.spec
    split: SplitName = "train" if "train" in spec.splits else "validation"
    num_chunks = -(-cache.num_windows(split) // spec.windows_per_chunk)
    chosen = np.linspace(0, num_chunks - 1, min(num_chunks, max_chunks)).astype(int).tolist()

    def values_of(chunk: int) -> tuple[np.ndarray | None, np.ndarray | None, int]:
        batch = cache.chunk(split, chunk)
        counts = np.ones(batch.input_ids[:, 1:].shape, bool) if batch.mask is None else batch.mask
        flat = {name: array[counts] for name, array in batch.target.items()}
        has_head = {"head_logits", "tail_logsumexp"} <= flat.keys()
        entropy = batch.signals.get("teacher_entropy")
        positions = int(np.count_nonzero(counts))
        has_head = has_head and positions > 0
        return Head.of(flat).mass if has_head else None, None if entropy is None else entropy[counts], positions

    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cache-sample") as pool:
        found = list(pool.map(values_of, chosen))
    return Sample(
        split=split,
        chunks=len(chosen),
        positions=sum(positions for *_, positions in found),
        head_mass=_histogram([mass for mass, _, _ in found], np.arange(_MASS_BINS + 1) / _MASS_BINS),
        entropy_nats=_histogram(
            [entropy for _, entropy, _ in found], np.arange(math.ceil(math.log(spec.vocab_size)) + 1.0)
        ),
    )


def _histogram(parts: list[np.ndarray | None], edges: np.ndarray) -> Histogram | None:
    known = [part.ravel() for part in parts if part is not None]
    return Histogram.of(np.concatenate(known), edges) if known else None
