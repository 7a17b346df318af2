"""Targets read from a cache: no teacher in memory, no corpus, no file of either."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tristill.cache import Cache, HiddenSpec, SplitName, WindowBatch
from tristill.cache.hidden import HiddenOutput
from tristill.cache.order import WindowOrder
from tristill.cache.profiles.profile import TailTreatment
from tristill.stages.models.language_model import State
from tristill.stages.targets.hidden import HiddenStates
from tristill.stages.targets.source import Epoch, Signals, TargetBatch
from tristill.stages.targets.stored import MakeTargets, make_targets


class CachedSource:
    """A TargetSource over a finished cache. Reads only the signals that are asked for."""

    kind = "cached"

    def __init__(self, cache: Cache, device: torch.device, windows_per_shard: int | None = None) -> None:
        """`windows_per_shard`: in the order of another cache over the same windows, of shards of that size."""
        self._cache = cache
        self._windows_per_shard = windows_per_shard or cache.spec.windows_per_shard
        self._device = device
        self.vocab_size = cache.spec.vocab_size
        self.end_of_text_id = cache.spec.end_of_text_id
        self.bos_id = cache.spec.bos_id
        self.splits = tuple(cache.spec.splits)
        self.context_length = cache.spec.context_length
        self.temperature = cache.spec.profile.temperature
        self.tokenizer_path = cache.tokenizer_path
        self._hidden = HiddenStates(cache.spec.hidden, cache.tables, device) if cache.spec.hidden else None
        self._hidden_stride = cache.spec.hidden.stride if cache.spec.hidden else 1
        self._makers: dict[TailTreatment | None, MakeTargets] = {}

    @property
    def identity(self) -> str | None:
        """The cache's fingerprint."""
        return self._cache.manifest.fingerprint

    def state_width(self, output: HiddenOutput) -> int:
        """Width of the states that the cache holds."""
        del output
        return self._held.width

    @property
    def query_width(self) -> int:
        """Width of the teacher's queries."""
        assert self._held.query_width is not None, "states of kind qkv know it"
        return self._held.query_width

    def known_layers(self, output: HiddenOutput) -> tuple[int, ...]:
        """The layers that the cache holds of this kind."""
        hidden = self._cache.spec.hidden
        return hidden.layers if hidden and hidden.output == output else ()

    @property
    def _held(self) -> HiddenSpec:
        assert self._cache.spec.hidden is not None, "a source is chosen for the signals that the losses need"
        return self._cache.spec.hidden

    def _targets_of(self, tail: TailTreatment | None) -> MakeTargets:
        if tail not in self._makers:
            spec = self._cache.spec
            tables = spec.target_part.own_tables(self._cache.tables)
            self._makers[tail] = make_targets(spec.profile, tables, self.vocab_size, self._device, tail)
        return self._makers[tail]

    def num_windows(self, split: SplitName) -> int:
        """Windows in a split."""
        return self._cache.num_windows(split)

    def bytes_per_token(self, split: SplitName) -> float:
        """Mean text bytes per token of a split."""
        return self._cache.spec.splits[split].bytes_per_token

    def order(self, split: SplitName, epoch: Epoch) -> WindowOrder:
        """The windows of an epoch in their order."""
        per_chunk = self._cache.spec.windows_per_chunk
        return WindowOrder(
            self.num_windows(split), per_chunk, self._windows_per_shard, epoch.seed, epoch.number, epoch.pacing
        )

    def mean_signals(self, split: SplitName) -> dict[str, np.ndarray]:
        """What the cache knows of each window at the teacher, as means; see Cache.mean_signals."""
        return self._cache.mean_signals(split)

    def batches(self, split: SplitName, batch_windows: int, signals: Signals, epoch: Epoch) -> Iterator[TargetBatch]:
        """See TargetSource."""
        hidden = self._cache.spec.hidden
        layers = tuple(state.layer for state in signals.states)
        for batch in self._cache.stream(
            split,
            batch_windows,
            seed=epoch.seed,
            epoch=epoch.number,
            first_batch=epoch.first_batch,
            pacing=epoch.pacing,
            rank=epoch.ranks.rank,
            world_size=epoch.ranks.world_size,
            windows_per_shard=self._windows_per_shard,
            drop_last=epoch.seed is not None,
            targets=signals.targets,
            hidden_layers=hidden.layers_to_read(layers) if hidden else layers,
        ):
            yield self._to_tensors(batch, signals)

    def _to_tensors(self, batch: WindowBatch, signals: Signals) -> TargetBatch:
        ids_BT1 = self._tensor(batch.input_ids).to(torch.int64)
        found = TargetBatch(
            ids_BT1[:, :-1],
            ids_BT1[:, 1:],
            None,
            {},
            self._hidden_stride,
            self._tensor(batch.signals["teacher_entropy"]) if signals.entropy else None,
            None if batch.mask is None else self._tensor(batch.mask),
        )
        targets = None
        if batch.target:
            arrays = {**batch.target, **batch.signals}
            flat = {name: found.counted(self._tensor(array)) for name, array in arrays.items()}
            targets = self._targets_of(signals.tail)(flat, found.counted(found.input_ids_BT))
        hidden = {}
        if self._hidden is not None and signals.states:
            stored = {layer: self._tensor(array) for layer, array in batch.hidden.items()}
            scales = {layer: self._tensor(array) for layer, array in batch.hidden_scale.items()}
            layers = tuple(state.layer for state in signals.states)
            by_layer = self._hidden.states(stored, scales, found.input_ids_BT, layers)
            hidden = {State(self._held.output, layer): states for layer, states in by_layer.items()}
        return replace(found, targets=targets, hidden=hidden)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
