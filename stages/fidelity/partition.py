"""The log-partition curve of a cache: how the teacher's distribution widens with temperature.

Shapes: N positions, V vocabulary, M temperatures.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tristill.cache import Cache, SplitName
from tristill.stages.losses.target import HeadTarget, LogitsTarget, RescaledTarget, SpreadTarget, Target
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.source import Epoch, Signals

_MAX_CELLS = 2**22
_MOST_POSITIONS = 2048


@dataclass(frozen=True)
class PartitionPoint:
    """logZ(tau) - z_max / tau = -log p_tau(most likely id) over positions, in nats: its mean and its deciles 1 and 9.

    head_mass: mean probability of the head's entries at tau; None where there is no head.
    """

    temperature: float
    mean_nats: float
    low_nats: float
    high_nats: float
    head_mass: float | None


@dataclass(frozen=True)
class PartitionCurve:
    """Points by rising temperature, over so many positions of a split."""

    split: SplitName
    positions: int
    points: tuple[PartitionPoint, ...]


def log_partition(cache: Cache, temperatures: tuple[float, ...]) -> PartitionCurve | None:
    """The curve at those of `temperatures` that the targets know; None if they know no distribution, as draws do not.

    A head whose tail is one mass knows the temperatures that it declares, and is asked for these instead.
    """
    spec = cache.spec
    split: SplitName = "validation" if "validation" in spec.splits else "train"
    source = CachedSource(cache, torch.device("cpu"))
    wanted = max(1, min(_MOST_POSITIONS, _MAX_CELLS // spec.vocab_size))
    num_windows = min(source.num_windows(split), -(-wanted // spec.context_length))
    batch = next(source.batches(split, num_windows, Signals(targets=True), Epoch()))
    assert batch.targets is not None, "they were asked for"
    rows = slice(0, min(wanted, len(batch.counted(batch.labels_BT))))
    if not rows.stop:
        return None
    target = batch.targets.chunk(rows)
    known = _known(target, temperatures)
    if not known:
        return None
    points = tuple(_point(target, temperature) for temperature in known)
    return PartitionCurve(split, rows.stop, points)


def _known(target: Target, temperatures: tuple[float, ...]) -> tuple[float, ...]:
    if isinstance(target, LogitsTarget | RescaledTarget):
        return temperatures
    if isinstance(target, SpreadTarget):
        target = target.head
    if not isinstance(target, HeadTarget):
        return ()
    return temperatures if target.tail_logsumexp_NM is None else target.temperatures


def _point(target: Target, temperature: float) -> PartitionPoint:
    assert isinstance(target, HeadTarget | SpreadTarget | LogitsTarget | RescaledTarget), "others know no temperature"
    found = target.log_probs(temperature)
    log_probs_NC = found[0] if isinstance(found, tuple) else found
    nats_N = -log_probs_NC.amax(dim=-1).double()
    low, high = nats_N.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    return PartitionPoint(temperature, float(nats_N.mean()), low, high, _head_mass(target, log_probs_NC))


def _head_mass(target: Target, log_probs_NC: Tensor) -> float | None:
    if isinstance(target, HeadTarget):
        mass_N = log_probs_NC.exp().sum(dim=-1)
    elif isinstance(target, SpreadTarget | RescaledTarget):
        head = target.head
        head_NK = log_probs_NC.gather(-1, head.head_ids_NK)
        mass_N = head_NK.masked_fill(head.head_logits_NK.isneginf(), -math.inf).exp().sum(dim=-1)
    else:
        return None
    return float(mass_N.double().mean())
