"""Profile `sampled`: draws from the teacher's distribution at one temperature; docs/format.md, section 4.

Random Sampling KD: Anshumann et al. 2025, Sparse Logit Sampling (arXiv 2503.16870), section 4.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from tristill.cache.arrays import ArraySpec, ids_dtype
from tristill.cache.coding.integers import num_tokens
from tristill.cache.coding.streams import Reading, Request, Sink
from tristill.cache.errors import CacheCorruptError
from tristill.cache.profiles.heads import IdRanks, RaggedIds, padded, places_of
from tristill.cache.profiles.profile import Coder, Need, Place, Profile

LARGEST_DRAWS = 255
_CONTEXTS = 16
_ID_CONTEXTS = 128


class SampledProfile(Profile):
    """N draws per position: unique ids, and how often each was drawn. Their shares are unbiased estimates of p."""

    kind: Annotated[Literal["sampled"], Field(description="name of the profile")] = "sampled"
    draws: Annotated[int, Field(ge=1, le=LARGEST_DRAWS, description="N, draws per position")] = 6
    draw: Annotated[
        Literal["systematic", "independent"],
        Field(
            description="independent: N draws with replacement; systematic: one uniform number u, and the ids at "
            "(u + i) / N of the cumulated distribution: unbiased too, each count within one of N p"
        ),
    ] = "systematic"
    temperature: Annotated[
        float,
        Field(gt=0, le=1000, description="tau_dump, the one temperature that the draws serve"),
    ] = 1.0
    seed: Annotated[int, Field(ge=0, description="seed of the draws, beside the position's place")] = 0

    def arrays(self, vocab_size: int, context_length: int) -> tuple[ArraySpec, ...]:
        """`draw_unique` U (T,), `draw_ids` (T, N) and `draw_counts` (T, N), of which U entries count; then 0 counts."""
        return (
            ArraySpec("draw_unique", (context_length,), "|u1"),
            ArraySpec("draw_ids", (context_length, self.draws), ids_dtype(vocab_size)),
            ArraySpec("draw_counts", (context_length, self.draws), "|u1"),
        )

    def tables(self, vocab_size: int) -> tuple[ArraySpec, ...]:
        """`ids_by_rank`: all ids, the most frequent first."""
        return (ArraySpec("ids_by_rank", (vocab_size,), ids_dtype(vocab_size)),)

    def models(self, vocab_size: int) -> dict[str, tuple[int, int]]:
        """Models of the number of unique ids, ids and counts."""
        return {
            "draw_unique": (1, max(2, num_tokens(self.draws))),
            "draw_id": (_ID_CONTEXTS, num_tokens(vocab_size)),
            "draw_count": (_CONTEXTS, max(2, num_tokens(self.draws))),
        }

    @property
    def make_coder(self) -> Callable[[Mapping[str, np.ndarray]], Coder]:
        """A SampledCoder of this profile."""
        return partial(SampledCoder, self)

    def unserved(self, need: Need, vocab_size: int) -> str | None:
        """Forward KL at tau_dump, where gradients are linear in p; nothing else."""
        del vocab_size
        if need.divergence != "forward_kl":
            return (
                f"{need.divergence} is asked for, but this cache holds draws, whose shares are unbiased for losses "
                "that are linear in p, which is forward KL alone; use forward KL, or a cache with profile transform"
            )
        if need.tail not in {None, "sampled"}:
            return f"tail {need.tail!r} is asked for, but this cache holds draws and no head; leave distill.tail out"
        if need.temperature == self.temperature and need.until is None:
            return None
        return (
            f"{need.temperatures} is asked for, but this sampled cache holds draws at "
            f"{self.temperature:g}: the shares of draws at one temperature say nothing unbiased about another; dump "
            "with cache.profile.temperature set to it, or use profile transform"
        )


class SampledCoder:
    """Unique ids as increasing ranks; of the counts all but the last, since they sum to N."""

    def __init__(self, profile: SampledProfile, tables: Mapping[str, np.ndarray]) -> None:
        self._draws = profile.draws
        self._ids = IdRanks(tables["ids_by_rank"])

    def write(self, arrays: Mapping[str, np.ndarray], place: Place, sink: Sink) -> None:
        """See Coder."""
        del place
        unique_N = arrays["draw_unique"].ravel().astype(np.int64)
        kept_NK = np.arange(self._draws) < unique_N[:, None]
        ranks_NK = self._ids.ranks[arrays["draw_ids"].reshape(-1, self._draws)]
        order_NK = np.argsort(np.where(kept_NK, ranks_NK, np.iinfo(np.int64).max), axis=1)
        counts_NK = arrays["draw_counts"].reshape(-1, self._draws).astype(np.int64)
        counts_E = np.take_along_axis(counts_NK, order_NK, axis=1)[kept_NK]
        sink.write("draw_unique", unique_N)
        RaggedIds(unique_N, np.take_along_axis(ranks_NK, order_NK, axis=1)[kept_NK]).write("draw_id", sink)
        position_E, place_E = places_of(unique_N)
        coded_E = place_E < unique_N[position_E] - 1
        sink.write("draw_count", counts_E[coded_E] - 1, self._contexts(unique_N[position_E][coded_E]))

    def read(self, place: Place) -> Reading[dict[str, np.ndarray]]:
        """See Coder."""
        unique_N = yield Request("draw_unique", place.num_positions)
        if unique_N.min() < 1 or unique_N.max() > self._draws:
            raise CacheCorruptError(
                f"holds {unique_N.min()} to {unique_N.max()} unique ids, expected 1 to {self._draws}"
            )
        position_E, place_E = places_of(unique_N)
        ragged = yield from RaggedIds.read("draw_id", unique_N, position_E, place_E)
        unique_E = unique_N[position_E]
        coded = np.flatnonzero(place_E < unique_E - 1)
        counts_E = np.zeros(len(position_E), np.int64)
        contexts = self._contexts(unique_E[coded])
        counts_E[coded] = (yield Request("draw_count", len(contexts), contexts)) + 1
        rest_N = self._draws - np.bincount(position_E, weights=counts_E, minlength=len(unique_N)).astype(np.int64)
        if (rest_N[unique_N > 0] < 1).any():
            raise CacheCorruptError(f"holds counts that sum to more than {self._draws} draws")
        counts_E[(np.cumsum(unique_N) - 1)[unique_N > 0]] = rest_N[unique_N > 0]
        counts_NK = np.zeros((len(unique_N), self._draws), np.uint8)
        counts_NK[position_E, place_E] = counts_E
        return {
            "draw_unique": unique_N.astype(np.uint8),
            "draw_ids": padded(self._ids.ids(ragged.ranks_E), unique_N, position_E, place_E, self._draws),
            "draw_counts": counts_NK,
        }

    @staticmethod
    def _contexts(unique: np.ndarray) -> np.ndarray:
        contexts: np.ndarray = np.minimum(unique - 1, _CONTEXTS - 1)
        return contexts
