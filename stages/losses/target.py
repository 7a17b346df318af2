"""What is known of the teacher's distribution at some positions, as the losses see it: cached or online alike.

Shapes: N positions, K kept head entries, V vocabulary, M declared temperatures, D width of the teacher.
"""

import bisect
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tristill.stages.losses.mixed import MixedTarget

_LOWEST_LOG_MASS = -1e3
"""Stands for no mass at all where a sum over the vocabulary would meet 0 times infinity."""


@dataclass(frozen=True)
class HeadTarget:
    """A head of single entries, and the rest as one bucket of known mass.

    head_ids_NK: int64. head_logits_NK: float32, (z - max z) / temperatures[0]; -inf marks an entry that is not there,
    whose id then repeats another of its row. tail_logsumexp_NM: float32, log sum over all other ids of exp((z - max
    z) / tau_m), or None when there are no other ids, or none that count.
    """

    head_ids_NK: Tensor
    head_logits_NK: Tensor
    tail_logsumexp_NM: Tensor | None
    temperatures: tuple[float, ...]

    def log_probs(self, temperature: float) -> tuple[Tensor, Tensor | None]:
        """(head_log_probs_NK, tail_log_prob_N) of p at `temperature`; together they sum to one.

        With a tail the temperature is a declared one: others cannot be known, and were refused before training started.
        """
        logits_NK = self.head_logits_NK * (self.temperatures[0] / temperature)
        if self.tail_logsumexp_NM is None:
            return torch.log_softmax(logits_NK, dim=-1), None
        assert temperature in self.temperatures, "a target with a tail serves the temperatures that it declares"
        tail_N = self.tail_logsumexp_NM[:, self.temperatures.index(temperature)]
        log_normalizer_N = torch.logaddexp(logits_NK.logsumexp(dim=-1), tail_N)
        return logits_NK - log_normalizer_N[:, None], tail_N - log_normalizer_N

    def top1(self) -> Tensor:
        """The most likely id, (N,)."""
        return self.head_ids_NK.gather(-1, self.head_logits_NK.argmax(dim=-1, keepdim=True))[:, 0]

    def largest(self, count: int, temperature: float) -> tuple[Tensor, Tensor]:
        """(ids_NK, log_probs_NK) of the `count` largest entries, or as many as there are; -inf where there is none."""
        del temperature
        found = self.head_logits_NK.topk(min(count, self.head_logits_NK.shape[1]), dim=-1)
        return self.head_ids_NK.gather(-1, found.indices), found.values


@dataclass(frozen=True)
class RenormalisedTarget:
    """A HeadTarget of which the head alone counts: its probabilities divided by their sum. Biased."""

    head: HeadTarget

    @property
    def head_ids_NK(self) -> Tensor:  # noqa: N802 - as in HeadTarget
        """The head's ids."""
        return self.head.head_ids_NK

    def log_probs(self, temperature: float) -> tuple[Tensor, Tensor]:
        """(head_log_probs_NK, tail_log_prob_N): the head sums to one, the tail is -inf."""
        logits_NK = self.head.head_logits_NK * (self.head.temperatures[0] / temperature)
        return torch.log_softmax(logits_NK, dim=-1), logits_NK.new_full((len(logits_NK),), -math.inf)

    def top1(self) -> Tensor:
        """The most likely id, (N,)."""
        return self.head.top1()

    def largest(self, count: int, temperature: float) -> tuple[Tensor, Tensor]:
        """See HeadTarget; up to a constant per position."""
        return self.head.largest(count, temperature)


@dataclass(frozen=True)
class PartialTarget(RenormalisedTarget):
    """A HeadTarget whose head keeps its probabilities while the tail is taken for zero: they sum to less than one."""

    def log_probs(self, temperature: float) -> tuple[Tensor, Tensor]:
        """(head_log_probs_NK, tail_log_prob_N): the tail is -inf."""
        log_probs_NK, _ = self.head.log_probs(temperature)
        return log_probs_NK, log_probs_NK.new_full((len(log_probs_NK),), -math.inf)


@dataclass(frozen=True)
class SpreadTarget:
    """A HeadTarget whose tail is spread evenly over all ids outside the head."""

    head: HeadTarget
    vocab_size: int

    def log_probs(self, temperature: float) -> Tensor:
        """Of the whole vocabulary, (N, V)."""
        head_NK, tail_N = self.head.log_probs(temperature)
        assert tail_N is not None, "a head without a tail is not spread"
        num_outside_N = self.vocab_size - torch.isfinite(head_NK).sum(dim=-1)
        each_N = (tail_N - num_outside_N.clamp(min=1).log()).clamp(min=_LOWEST_LOG_MASS)
        spread_NV = each_N[:, None].repeat(1, self.vocab_size)
        return spread_NV.scatter_(-1, self.head.head_ids_NK, filled(head_NK, torch.isfinite(head_NK)))

    def top1(self) -> Tensor:
        """The most likely id, (N,)."""
        return self.head.top1()

    def largest(self, count: int, temperature: float) -> tuple[Tensor, Tensor]:
        """See HeadTarget: the tail has no order."""
        return self.head.largest(count, temperature)


@dataclass(frozen=True)
class LogitsTarget:
    """All logits, at temperature 1, float32 (N, V)."""

    logits_NV: Tensor

    def log_probs(self, temperature: float) -> Tensor:
        """Of the whole vocabulary, (N, V)."""
        scaled_NV = self.logits_NV if temperature == 1 else self.logits_NV / temperature
        return torch.log_softmax(scaled_NV, dim=-1)

    def top1(self) -> Tensor:
        """The most likely id, (N,)."""
        return self.logits_NV.argmax(dim=-1)

    def largest(self, count: int, temperature: float) -> tuple[Tensor, Tensor]:
        """See HeadTarget; log-probabilities up to a constant per position."""
        found = self.logits_NV.topk(min(count, self.logits_NV.shape[1]), dim=-1)
        return found.indices, found.values / temperature


@dataclass(frozen=True)
class RescaledTarget:
    """Approximate logits of the whole vocabulary, corrected by a head that is exact and a tail of exact mass.

    tail_NV: float32 at temperature 1, -inf at the ids of the head, known up to a constant c per position. head: as
    HeadTarget, its tail exact at the declared temperatures. The correction of the tail's log-mass is c / tau and
    something small: at other temperatures it is taken as linear in 1 / tau through the two nearest declared ones, or as
    c / tau if there is one (docs/methods.md).
    """

    tail_NV: Tensor
    head: HeadTarget

    @classmethod
    def of(cls, logits_NV: Tensor, head: HeadTarget) -> "RescaledTarget":
        """From logits of the whole vocabulary, which are overwritten."""
        return cls(logits_NV.scatter_(-1, head.head_ids_NK, -math.inf), head)

    def log_probs(self, temperature: float) -> Tensor:
        """Of the whole vocabulary, (N, V)."""
        head_NK = self.head.head_logits_NK * (self.head.temperatures[0] / temperature)
        exact_N = self._tail_logsumexp(temperature)
        log_normalizer_N = torch.logaddexp(head_NK.logsumexp(dim=-1), exact_N)
        scaled_NV = self.tail_NV if temperature == 1 else self.tail_NV / temperature
        log_probs_NV = torch.log_softmax(scaled_NV, dim=-1)
        log_probs_NV += (exact_N - log_normalizer_N)[:, None]
        head_NK = filled(head_NK - log_normalizer_N[:, None], torch.isfinite(head_NK))
        return log_probs_NV.scatter_(-1, self.head.head_ids_NK, head_NK)

    def _tail_logsumexp(self, temperature: float) -> Tensor:
        declared = self.head.temperatures
        exact_NM = self.head.tail_logsumexp_NM
        assert exact_NM is not None, "a transform cache always holds the tail's mass"
        exact_NM = exact_NM.clamp(min=_LOWEST_LOG_MASS)
        if temperature in declared:
            return exact_NM[:, declared.index(temperature)]
        if len(declared) == 1:
            nodes, shares = [0], [declared[0] / temperature]
        else:
            first = min(bisect.bisect_left(declared, temperature, 1, len(declared) - 1), len(declared) - 1)
            nodes = [first - 1, first]
            left, right = (1 / declared[m] for m in nodes)
            share = (1 / temperature - left) / (right - left)
            shares = [1 - share, share]
        log_mass_N = (self.tail_NV / temperature).logsumexp(dim=-1)
        for m, share in zip(nodes, shares, strict=True):
            log_mass_N = log_mass_N + share * (exact_NM[:, m] - (self.tail_NV / declared[m]).logsumexp(dim=-1))
        return log_mass_N.nan_to_num(nan=_LOWEST_LOG_MASS)  # no id outside the head

    def top1(self) -> Tensor:
        """The most likely id, (N,)."""
        return self.head.top1()

    def largest(self, count: int, temperature: float) -> tuple[Tensor, Tensor]:
        """See HeadTarget: of the whole vocabulary."""
        found = self.log_probs(temperature).topk(min(count, self.tail_NV.shape[1]), dim=-1)
        return found.indices, found.values


@dataclass(frozen=True)
class DrawnTarget:
    """Draws from the distribution at one temperature: an unbiased estimate of it, not the distribution itself.

    ids_NK: int64. shares_NK: float32, how often each was drawn, summing to 1; 0 where an id only fills the row.
    entropy_N: float32, the teacher's entropy in nats at that temperature.
    """

    ids_NK: Tensor
    shares_NK: Tensor
    entropy_N: Tensor
    temperature: float


FullTarget = SpreadTarget | LogitsTarget | RescaledTarget | MixedTarget
OrderedTarget = HeadTarget | RenormalisedTarget | PartialTarget | FullTarget
Target = OrderedTarget | DrawnTarget
Rows = slice | Tensor
"""Which positions: consecutive ones, or any by number."""


class Targets(Protocol):
    """Targets of all positions of a batch, handed out in chunks so that [positions, V] is never whole in memory."""

    def chunk(self, rows: Rows, dtype: torch.dtype = torch.float32) -> Target:
        """The targets of some positions, on the device of the student; large products are computed in `dtype`."""
        ...


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """c tanh(z / c), or z where there is no cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@dataclass(frozen=True)
class ComputedTargets:
    """Targets from a teacher's features final_ND and its output matrix head_VD; the whole distribution.

    softcap: logits are c tanh(z / c) of the products z (Gemma 2, arXiv 2408.00118, section 2); None leaves them.
    """

    final_ND: Tensor
    head_VD: Tensor
    softcap: float | None = None

    def chunk(self, rows: Rows, dtype: torch.dtype = torch.float32) -> LogitsTarget:
        """Full-vocabulary logits of some rows."""
        logits_NV = (self.final_ND[rows].to(dtype) @ self.head_VD.to(dtype).T).float()
        return LogitsTarget(softcapped(logits_NV, self.softcap))


@dataclass(frozen=True)
class SelectedTargets:
    """Targets of some of the positions."""

    targets: Targets
    positions_M: Tensor

    def chunk(self, rows: Rows, dtype: torch.dtype = torch.float32) -> Target:
        """The targets of some of them."""
        return self.targets.chunk(self.positions_M[rows], dtype)


def ordered(target: Target | None) -> OrderedTarget:
    """The target of a term that needs probabilities or their order, which draws do not know."""
    assert target is not None, "a source is chosen for the signals that the losses need"
    assert not isinstance(target, DrawnTarget), "draws serve forward KL only; others were refused"
    return target


def filled(head_NK: Tensor, is_there_NK: Tensor) -> Tensor:
    """Head values in which entries that are not there repeat the value of the row's first id, as their ids do."""
    return torch.where(is_there_NK, head_NK, head_NK[:, :1])
