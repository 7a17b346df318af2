"""Targets of several caches over the same windows, mixed as they are read.

Shapes: N positions, K entries, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from tristill.cache import Cache, CacheMismatchError, SplitName
from tristill.cache.hashing import fingerprint_of
from tristill.cache.profiles.dense import DenseProfile
from tristill.cache.profiles.plain_topk import PlainTopKProfile
from tristill.cache.profiles.profile import TailTreatment
from tristill.cache.profiles.sampled import SampledProfile
from tristill.cache.profiles.topk import TopKProfile
from tristill.cache.profiles.transform import TransformProfile
from tristill.cache.spec import AnyProfile
from tristill.stages.losses.mixed import MixedTarget, WholeTarget
from tristill.stages.losses.target import DrawnTarget, FullTarget, HeadTarget, LogitsTarget, Rows, Target, Targets
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.source import Epoch, Signals, TargetBatch

Kind = Literal["whole", "draws", "head"]


def kind_of_targets(profile: AnyProfile, tail: TailTreatment | None, vocab_size: int) -> Kind:
    """What targets of a profile are: whole distributions, draws, or heads, which no two caches have alike."""
    match profile:
        case SampledProfile():
            return "draws"
        case DenseProfile():
            return "whole"
        case TransformProfile():
            return "whole" if tail in {None, "uniform"} else "head"
        case PlainTopKProfile():
            return "whole" if profile.top_k == vocab_size or tail == "uniform" else "head"
        case TopKProfile():
            return "whole" if (tail or profile.tail) == "uniform" else "head"


class MixedSource(CachedSource):
    """A CachedSource whose targets are those of several caches; all else is of the first, the run's own."""

    def __init__(
        self,
        cache: Cache,
        others: Sequence[Cache],
        shares: tuple[float, ...],
        tail: TailTreatment | None,
        device: torch.device,
    ) -> None:
        """Shares are of all caches, the run's own first. `tail`: what is taken where a reader does not say.

        The caches were checked to hold the same windows in the same order, and targets that can be mixed.
        """
        super().__init__(cache, device)
        self._others = [CachedSource(other, device, cache.spec.windows_per_shard) for other in others]
        self._folders = [other.folder for other in others]
        self._shares = shares
        self._tail = tail

    @property
    def identity(self) -> str | None:
        """Of all caches, their shares and the tail."""
        found = [super().identity, *(other.identity for other in self._others)]
        return fingerprint_of([*found, list(self._shares), self._tail])

    def batches(self, split: SplitName, batch_windows: int, signals: Signals, epoch: Epoch) -> Iterator[TargetBatch]:
        """See TargetSource."""
        signals = replace(signals, tail=signals.tail or self._tail)
        own = super().batches(split, batch_windows, signals, epoch)
        if not signals.targets:
            yield from own
            return
        targets_alone = Signals(targets=True, tail=signals.tail)
        streams = [other.batches(split, batch_windows, targets_alone, epoch) for other in self._others]
        for batch, *beside in zip(own, *streams, strict=True):
            for folder, other in zip(self._folders, beside, strict=True):
                if not torch.equal(batch.input_ids_BT, other.input_ids_BT) or not _same_mask(batch, other):
                    raise CacheMismatchError(
                        f"{folder}: found other ids or masks than the run's own cache has in the same windows of split "
                        f"{split}, though both name the same windows; run `tristill cache verify` on both"
                    )
            parts = tuple(part.targets for part in (batch, *beside) if part.targets is not None)
            yield replace(batch, targets=MixedTargets(parts, self._shares, self.temperature))


def _same_mask(batch: TargetBatch, other: TargetBatch) -> bool:
    if batch.counts_BT is None or other.counts_BT is None:
        return batch.counts_BT is other.counts_BT
    return torch.equal(batch.counts_BT, other.counts_BT)


@dataclass(frozen=True)
class MixedTargets:
    """Targets of several caches at the same positions. temperature: see MixedTarget."""

    parts: tuple[Targets, ...]
    shares: tuple[float, ...]
    temperature: float

    def chunk(self, rows: Rows, dtype: torch.dtype = torch.float32) -> MixedTarget | DrawnTarget:
        """The mixture at some rows."""
        found = [part.chunk(rows, dtype) for part in self.parts]
        drawn = [target for target in found if isinstance(target, DrawnTarget)]
        if drawn:
            return mixed_draws(drawn, self.shares)
        return MixedTarget(tuple(map(_whole, found)), self.shares, self.temperature)


def mixed_draws(parts: Sequence[DrawnTarget], shares: Sequence[float]) -> DrawnTarget:
    """All draws, each part's counting by its share: unbiased for the mixture, and so is the gradient of forward KL.

    entropy_N is the mean of the parts' entropies, so that forward KL is the mean of the divergences from each part:
    above that from the mixture by what no student changes.
    """
    (temperature,) = {part.temperature for part in parts}
    weighted = list(zip(parts, shares, strict=True))
    return DrawnTarget(
        torch.cat([part.ids_NK for part in parts], dim=1),
        torch.cat([part.shares_NK * share for part, share in weighted], dim=1),
        torch.stack([part.entropy_N * share for part, share in weighted]).sum(dim=0),
        temperature,
    )


def _whole(target: Target) -> WholeTarget:
    """The target itself, or, of a head that is the whole vocabulary, its logits in the order of ids."""
    if isinstance(target, FullTarget):
        return target
    assert isinstance(target, HeadTarget), "heads with anything outside were refused"
    assert target.tail_logsumexp_NM is None, "heads with anything outside were refused"
    logits_NK = target.head_logits_NK * target.temperatures[0]
    return LogitsTarget(torch.zeros_like(logits_NK).scatter_(-1, target.head_ids_NK, logits_NK))
