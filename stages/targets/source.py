"""The seam between training or evaluation and where windows and targets come from.

Shapes: B windows, T positions, N positions that count, D width of the teacher.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tristill.cache.hidden import HiddenOutput
from tristill.cache.order import Pacing, WindowOrder
from tristill.cache.profiles.profile import TailTreatment
from tristill.cache.spec import SplitName
from tristill.stages.collectives import sum_of
from tristill.stages.errors import CorpusError, StageError
from tristill.stages.losses.target import Targets
from tristill.stages.models.language_model import State
from tristill.stages.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Signals:
    """What is wanted of the teacher: targets on its distribution, its entropy, and hidden states.

    tail: what is taken for the tail of a cached head; None for what the cache knows best.
    """

    targets: bool = False
    tail: TailTreatment | None = None
    entropy: bool = False
    states: tuple[State, ...] = ()


@dataclass(frozen=True)
class Epoch:
    """One pass over a split, from `first_batch` on.

    With a seed, whole batches in an order that is a function of (seed, number); without, all windows as stored. pacing:
    which windows are seen when; None for all. ranks: each gets its share of every batch, whose windows are counted over
    all ranks; a rank whose share of a last, short batch is empty does not get that one.
    """

    seed: int | None = None
    number: int = 0
    first_batch: int = 0
    pacing: Pacing | None = None
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class TargetBatch:
    """Windows and what is known of the teacher there.

    input_ids_BT, labels_BT: int64, labels are the next ids. counts_BT: bool, the positions that count in losses and
    metrics, None if all do; N of them. targets: of these N in row-major order, None if not asked for. hidden: the
    teacher's hidden states at positions 0, hidden_stride, 2 hidden_stride, .. of each window, (B, T', D). entropy_BT:
    the teacher's, in nats at the temperature of the dump, to 1/8 nat, None if not asked for. Both mean nothing where a
    position does not count.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    targets: Targets | None
    hidden: dict[State, Tensor]
    hidden_stride: int = 1
    entropy_BT: Tensor | None = None
    counts_BT: Tensor | None = None

    def counted(self, values_BT: Tensor) -> Tensor:
        """Values (B, T, ..) at the positions that count, (N, ..)."""
        return values_BT.flatten(0, 1) if self.counts_BT is None else values_BT[self.counts_BT]


def counted_by_all(batch: TargetBatch, ranks: Ranks) -> int:
    """Positions that count in the batch of all ranks."""
    if batch.counts_BT is None:
        return batch.labels_BT.numel() * ranks.world_size
    return round(sum_of(int(batch.counts_BT.sum()), ranks))


class TargetSource(Protocol):
    """Windows of both splits with the teacher's signals, however they come about.

    The order of training windows is the same for every source over the same windows (docs/format.md, section 10).
    """

    kind: str
    vocab_size: int
    end_of_text_id: int
    bos_id: int | None
    splits: tuple[SplitName, ...]
    context_length: int
    temperature: float
    tokenizer_path: Path

    @property
    def identity(self) -> str | None:
        """Hash of the windows and of what is known of the teacher there; None if nobody knows it."""
        ...

    def state_width(self, output: HiddenOutput) -> int:
        """Width of the teacher's states of this kind."""
        ...

    @property
    def query_width(self) -> int:
        """Width of the teacher's queries, within states of kind qkv."""
        ...

    def known_layers(self, output: HiddenOutput) -> tuple[int, ...]:
        """The teacher's layers of which there are states of this kind."""
        ...

    def num_windows(self, split: SplitName) -> int:
        """Windows in a split."""
        ...

    def bytes_per_token(self, split: SplitName) -> float:
        """Mean text bytes per token of a split."""
        ...

    def order(self, split: SplitName, epoch: Epoch) -> WindowOrder:
        """The windows of an epoch in their order."""
        ...

    def batches(self, split: SplitName, batch_windows: int, signals: Signals, epoch: Epoch) -> Iterator[TargetBatch]:
        """The batches of one epoch with what is wanted of the teacher."""
        ...


def endless_batches(
    source: TargetSource,
    batch_windows: int,
    signals: Signals,
    seed: int,
    pacing: Pacing | None = None,
    ranks: Ranks = ALONE,
) -> Callable[[int], Iterator[TargetBatch]]:
    """The endless sequence of training batches, epoch after epoch, as a function of the number of its first batch.

    `batch_windows` are those of all ranks, of which each gets its equal share.
    """
    if batch_windows % ranks.world_size:
        raise StageError(
            f"training.batch_windows: found {batch_windows}, expected a multiple of the {ranks.world_size} ranks, "
            "which share every batch equally; change it, or the number of ranks"
        )
    num_windows = source.num_windows("train")
    batches_per_epoch = num_windows // batch_windows
    if batches_per_epoch == 0:
        raise CorpusError(
            f"the train split has {num_windows} windows, fewer than one batch of {batch_windows}; lower "
            "training.batch_windows or give more text"
        )

    def paced_batches_from(first: int) -> Iterator[TargetBatch]:
        assert pacing is not None, "called only then"
        number, before = 0, 0
        while True:
            paced = replace(pacing, batches_before=before)
            in_epoch = source.order("train", Epoch(seed, number, pacing=paced)).num_windows // batch_windows
            if first < before + in_epoch:
                yield from source.batches(
                    "train", batch_windows, signals, Epoch(seed, number, first - before, paced, ranks)
                )
                first = before + in_epoch
            number, before = number + 1, before + in_epoch

    def batches_from(first: int) -> Iterator[TargetBatch]:
        number, first_batch = divmod(first, batches_per_epoch)
        while True:
            yield from source.batches("train", batch_windows, signals, Epoch(seed, number, first_batch, ranks=ranks))
            number, first_batch = number + 1, 0

    return batches_from if pacing is None else paced_batches_from
