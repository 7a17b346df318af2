"""Targets read from a cache: no teacher in memory, no corpus, no file of either."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cache import Cache, SplitName, WindowBatch
from stages.targets.hidden import HiddenStates
from stages.targets.source import Epoch, Signals, TargetBatch
from stages.targets.stored import make_targets


class CachedSource:
    """A TargetSource over a finished cache. Reads only the signals that are asked for."""

    kind = "cached"

    def __init__(self, cache: Cache, device: torch.device) -> None:
        self._cache = cache
        self._device = device
        self.vocab_size = cache.spec.vocab_size
        self.end_of_text_id = cache.spec.end_of_text_id
        self.context_length = cache.spec.context_length
        self.temperature = cache.spec.profile.temperature
        self.teacher_width = cache.spec.hidden.width if cache.spec.hidden else None
        self.tokenizer_path = cache.tokenizer_path
        own_tables = cache.spec.target_part.own_tables(cache.tables)
        self._hidden = HiddenStates(cache.spec.hidden, cache.tables, device) if cache.spec.hidden else None
        self._hidden_stride = cache.spec.hidden.stride if cache.spec.hidden else 1
        self._targets_of = make_targets(cache.spec.profile, own_tables, self.vocab_size, device)

    def num_windows(self, split: SplitName) -> int:
        """Windows in a split."""
        return self._cache.num_windows(split)

    def bytes_per_token(self, split: SplitName) -> float:
        """Mean text bytes per token of a split."""
        return self._cache.spec.splits[split].bytes_per_token

    def batches(self, split: SplitName, batch_windows: int, signals: Signals, epoch: Epoch) -> Iterator[TargetBatch]:
        """See TargetSource."""
        hidden = self._cache.spec.hidden
        for batch in self._cache.stream(
            split,
            batch_windows,
            seed=epoch.seed,
            epoch=epoch.number,
            first_batch=epoch.first_batch,
            drop_last=epoch.seed is not None,
            targets=signals.targets,
            hidden_layers=hidden.layers_to_read(signals.hidden_layers) if hidden else signals.hidden_layers,
        ):
            yield self._to_tensors(batch, signals.hidden_layers)

    def _to_tensors(self, batch: WindowBatch, hidden_layers: tuple[int, ...]) -> TargetBatch:
        ids_BT1 = self._tensor(batch.input_ids).to(torch.int64)
        targets = None
        if batch.target:
            arrays = {**batch.target, **batch.signals}
            flat = {name: self._tensor(array).flatten(0, 1) for name, array in arrays.items()}
            targets = self._targets_of(flat, ids_BT1[:, :-1].flatten())
        hidden = {}
        if self._hidden is not None and hidden_layers:
            stored = {layer: self._tensor(array) for layer, array in batch.hidden.items()}
            scales = {layer: self._tensor(array) for layer, array in batch.hidden_scale.items()}
            hidden = self._hidden.states(stored, scales, ids_BT1[:, :-1], hidden_layers)
        return TargetBatch(ids_BT1[:, :-1], ids_BT1[:, 1:], targets, hidden, self._hidden_stride)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
