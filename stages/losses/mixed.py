"""A mixture of distributions over the whole vocabulary, as the losses see it.

Shapes: N positions, V vocabulary, K entries.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def log_mixture(log_probs: Iterable[Tensor], shares: Sequence[float]) -> Tensor:
    """log sum_k share_k p_k from log p_k; two of them at a time are in memory, if they are made one by one.

    Nothing of a part whose share is zero, so that its infinities do not matter. Shares sum to one.
    """
    mixture: Tensor | None = None
    for log_p, share in zip(log_probs, shares, strict=True):
        if share:
            part = log_p + math.log(share)
            mixture = part if mixture is None else torch.logaddexp(mixture, part)
    assert mixture is not None, "a mixture has parts"
    return mixture


class WholeTarget(Protocol):
    """What knows the whole distribution."""

    def log_probs(self, temperature: float) -> Tensor:
        """Of the whole vocabulary, (N, V)."""
        ...


@dataclass(frozen=True)
class MixedTarget:
    """sum_k share_k p_k, every p_k at the temperature that is asked for.

    temperature: the one at which the most likely id is asked for; at others it may be another id.
    """

    parts: tuple[WholeTarget, ...]
    shares: tuple[float, ...]
    temperature: float

    def log_probs(self, temperature: float) -> Tensor:
        """Of the whole vocabulary, (N, V)."""
        return log_mixture((part.log_probs(temperature) for part in self.parts), self.shares)

    def top1(self) -> Tensor:
        """The most likely id, (N,)."""
        return self.log_probs(self.temperature).argmax(dim=-1)

    def largest(self, count: int, temperature: float) -> tuple[Tensor, Tensor]:
        """See HeadTarget: of the whole vocabulary."""
        log_p_NV = self.log_probs(temperature)
        found = log_p_NV.topk(min(count, log_p_NV.shape[1]), dim=-1)
        return found.indices, found.values
