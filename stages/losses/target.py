"""What is known of the teacher's distribution, as the losses see it: cached or online alike.

Shapes: N positions, K kept head entries, V vocabulary, D width of the teacher.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadTarget:
    """The teacher's distribution at N positions: a head of single entries, and the rest as one bucket.

    head_ids_NK: int64, or None when the head is the whole vocabulary in order of ids. head_logits_NK: float32,
    (z - max z) / temperature. tail_logsumexp_N: float32, log sum over all other ids of exp((z - max z) / temperature),
    or None when there are no other ids.
    """

    head_ids_NK: Tensor | None
    head_logits_NK: Tensor
    tail_logsumexp_N: Tensor | None
    temperature: float

    def log_probs(self, temperature: float) -> tuple[Tensor, Tensor | None]:
        """(head_log_probs_NK, tail_log_prob_N) of p at `temperature`; together they sum to one.

        With a tail the temperature is that of the target: other ones cannot be known, and were refused before training
        started.
        """
        if self.tail_logsumexp_N is None:
            return torch.log_softmax(self.head_logits_NK * (self.temperature / temperature), dim=-1), None
        assert temperature == self.temperature, "a target with a tail serves its own temperature only"
        log_normalizer_N = torch.logaddexp(self.head_logits_NK.logsumexp(dim=-1), self.tail_logsumexp_N)
        return self.head_logits_NK - log_normalizer_N[:, None], self.tail_logsumexp_N - log_normalizer_N


class Targets(Protocol):
    """Targets of all positions of a batch, handed out in chunks so that [positions, V] is never whole in memory."""

    def chunk(self, rows: slice) -> HeadTarget:
        """The targets of some positions, on the device of the student."""
        ...


@dataclass(frozen=True)
class StoredTargets:
    """Targets read from a `topk` cache: head_ids_NK and head_logits_NK of any stored type, tail_logsumexp_N."""

    head_ids_NK: Tensor
    head_logits_NK: Tensor
    tail_logsumexp_N: Tensor
    temperature: float
    vocab_size: int

    def chunk(self, rows: slice) -> HeadTarget:
        """Rows as float32 and int64; no tail when the head is the whole vocabulary."""
        has_tail = self.head_ids_NK.shape[-1] < self.vocab_size
        return HeadTarget(
            self.head_ids_NK[rows].to(torch.int64),
            self.head_logits_NK[rows].float(),
            self.tail_logsumexp_N[rows].float() if has_tail else None,
            self.temperature,
        )


@dataclass(frozen=True)
class ComputedTargets:
    """Targets from a teacher in memory: its features final_ND and output matrix head_VD; the whole distribution."""

    final_ND: Tensor
    head_VD: Tensor

    def chunk(self, rows: slice) -> HeadTarget:
        """Full-vocabulary logits of some rows, at temperature 1."""
        logits_NV = (self.final_ND[rows] @ self.head_VD.T).float()
        return HeadTarget(None, logits_NV - logits_NV.amax(dim=-1, keepdim=True), None, temperature=1.0)
