"""Targets from a frozen teacher forwarded at every step; without a teacher, windows and labels alone."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tristill.cache.hidden import HiddenOutput
from tristill.cache.layout import (
    DEFAULT_SHARD_POSITIONS,
    TOKENIZER_NAME,
    default_windows_per_chunk,
    windows_per_shard,
)
from tristill.cache.order import Deal, WindowOrder
from tristill.cache.parts import SIGNAL_STEP_NATS
from tristill.cache.spec import SplitName
from tristill.stages.data.tokenized import corpus_of_model, load_corpus, split_windows
from tristill.stages.losses.chunked_head import chunks
from tristill.stages.losses.target import ComputedTargets
from tristill.stages.models.language_model import Features, LanguageModel, finite_features
from tristill.stages.targets.source import Epoch, Signals, TargetBatch


class OnlineSource:
    """A TargetSource over a tokenized corpus and a teacher in memory. Gives the whole distribution."""

    kind = "online"

    def __init__(
        self,
        data_folder: Path,
        device: torch.device,
        *,
        teacher: LanguageModel | None = None,
        temperature: float = 1.0,
        max_train_windows: int | None = None,
        shard_positions: int = DEFAULT_SHARD_POSITIONS,
        hidden_stride: int = 1,
        tokenizer_folder: Path | None = None,
    ) -> None:
        """`temperature` is what a loss or metric uses that names none; targets serve any.

        `max_train_windows`, `shard_positions`: those of a cache, whose windows and order these are.
        `hidden_stride`: hidden states are given at every so many positions, as a cache would hold them.
        `tokenizer_folder`: where the tokenizer is with all that goes with it; that of the corpus if None.
        """
        self._corpus = (
            corpus_of_model(data_folder, teacher.vocab_size, "the teacher") if teacher else load_corpus(data_folder)
        )
        self._device = device
        self._teacher = teacher.to(device).eval() if teacher else None
        limits: dict[SplitName, int | None] = {"train": max_train_windows}
        self._windows = {split: split_windows(data_folder, split, limits.get(split)) for split in self._corpus.splits}
        self.vocab_size = self._corpus.vocab_size
        self.end_of_text_id = self._corpus.end_of_text_id
        self.bos_id = self._corpus.bos_id
        self.splits = tuple(self._corpus.splits)
        self.context_length = self._corpus.context_length
        self.temperature = temperature
        self._hidden_stride = hidden_stride
        self._shard_positions = shard_positions
        self.tokenizer_path = (tokenizer_folder or data_folder) / TOKENIZER_NAME

    @property
    def identity(self) -> str | None:
        """That of the windows, if there is no teacher, whose weights may move."""
        return self._corpus.fingerprint if self._teacher is None else None

    def state_width(self, output: HiddenOutput) -> int:
        """Width of the teacher's states of this kind."""
        return self._known_teacher.widths.of(output)

    @property
    def query_width(self) -> int:
        """Width of the teacher's queries."""
        return self._known_teacher.widths.query

    def known_layers(self, output: HiddenOutput) -> tuple[int, ...]:
        """All blocks of the teacher."""
        del output
        return tuple(range(1, self._known_teacher.depth + 1))

    @property
    def _known_teacher(self) -> LanguageModel:
        assert self._teacher is not None, "a source is chosen for the signals that the losses need"
        return self._teacher

    def num_windows(self, split: SplitName) -> int:
        """Windows in a split."""
        return self._windows[split].num_windows

    def bytes_per_token(self, split: SplitName) -> float:
        """Mean text bytes per token of a split."""
        return self._corpus.splits[split].bytes_per_token

    def order(self, split: SplitName, epoch: Epoch) -> WindowOrder:
        """The windows of an epoch in their order."""
        per_chunk = default_windows_per_chunk(self.context_length)
        per_shard = windows_per_shard(self.context_length, self._shard_positions)
        return WindowOrder(self.num_windows(split), per_chunk, per_shard, epoch.seed, epoch.number, epoch.pacing)

    def batches(self, split: SplitName, batch_windows: int, signals: Signals, epoch: Epoch) -> Iterator[TargetBatch]:
        """See TargetSource."""
        deal = Deal(batch_windows, epoch.ranks.rank, epoch.ranks.world_size)
        drop_last = epoch.seed is not None
        for batches in self.order(split, epoch).batches(deal, epoch.first_batch, drop_last=drop_last):
            for windows in batches.tolist():
                if windows:
                    yield self._batch(split, windows, signals)

    def _batch(self, split: SplitName, windows: list[int], signals: Signals) -> TargetBatch:
        ids_BT1 = torch.from_numpy(self._windows[split].read(windows)).to(self._device, torch.int64)
        input_ids_BT = ids_BT1[:, :-1]
        mask = self._windows[split].mask(windows)
        counts_BT = None if mask is None else torch.from_numpy(mask).to(self._device)
        batch = TargetBatch(input_ids_BT, ids_BT1[:, 1:], None, {}, counts_BT=counts_BT)
        return batch if self._teacher is None or signals == Signals() else self.with_teacher(batch, signals)

    def taught_by(self, teacher: LanguageModel) -> "OnlineSource":
        """The same windows with another teacher."""
        other = copy.copy(self)
        other._teacher = teacher  # noqa: SLF001 - our own
        return other

    def with_teacher(self, batch: TargetBatch, signals: Signals) -> TargetBatch:
        """A batch of windows with what the teacher, as it is now, says of them."""
        assert self._teacher is not None, "a source is chosen for the signals that the losses need"
        with torch.no_grad():
            return self.with_features(
                batch, signals, finite_features(self._teacher, batch.input_ids_BT, signals.states)
            )

    def with_features(self, batch: TargetBatch, signals: Signals, features: Features) -> TargetBatch:
        """The same from what the teacher's forward pass found; no gradient leads back to it."""
        assert self._teacher is not None, "it was just forwarded"
        final_ND, head_VD = batch.counted(features.final_BTD.detach()), self._teacher.head_weight.detach()
        targets = ComputedTargets(final_ND, head_VD, self._teacher.softcap)
        hidden = {state: found.detach()[:, :: self._hidden_stride] for state, found in features.hidden.items()}
        entropy_BT = None
        if signals.entropy:
            entropy_BT = torch.zeros(batch.input_ids_BT.shape, device=batch.input_ids_BT.device)
            is_counted = torch.ones_like(entropy_BT, dtype=torch.bool) if batch.counts_BT is None else batch.counts_BT
            entropy_BT[is_counted] = self._entropy(targets)
        return replace(batch, targets=targets, hidden=hidden, hidden_stride=self._hidden_stride, entropy_BT=entropy_BT)

    def _entropy(self, targets: ComputedTargets) -> Tensor:
        """As a cache would hold it, (N,)."""
        if not len(targets.final_ND):
            return targets.final_ND.new_zeros(0)
        parts = []
        for rows in chunks(len(targets.final_ND), self.vocab_size):
            log_p_NV = targets.chunk(rows).log_probs(self.temperature)
            entropy_N = -(log_p_NV.exp() * log_p_NV).sum(dim=-1)
            parts.append((entropy_N / SIGNAL_STEP_NATS).round() * SIGNAL_STEP_NATS)
        return torch.cat(parts)
