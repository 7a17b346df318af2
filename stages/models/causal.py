"""Any causal language model in a folder, ours or of transformers, ready to generate."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tristill.stages.errors import CheckpointError
from tristill.stages.models.companions import SpecialIds
from tristill.stages.models.description import CONFIG_NAME, START_KEY, TOKENIZER_NAME, is_ours, read_config
from tristill.stages.models.folder import load_model
from tristill.stages.models.generate import CausalModel, Rollout, TransformerRollout
from tristill.stages.models.hugging_face import HuggingFaceModel
from tristill.stages.models.hugging_face_folder import load_inner, num_ids
from tristill.stages.models.language_model import LanguageModel
from tristill.stages.models.origin import Origin, checked_origin
from tristill.stages.models.positions import trained_positions
from tristill.stages.models.transformer import Transformer


def load_causal_model(folder: Path, device: torch.device) -> CausalModel:
    """The model in `folder`: a teacher or student of ours by our own code, anything else by transformers."""
    origin = checked_origin(folder)
    if origin is None and is_ours(read_config(folder / CONFIG_NAME)):
        return causal_model(load_model(folder).to(device).eval(), folder, device)
    return _hugging_face_model(origin or Origin(folder=folder), folder / TOKENIZER_NAME, device)


def causal_model(model: LanguageModel, folder: Path, device: torch.device) -> CausalModel:
    """A model of ours that is on the device, packed or not, with what its folder says of it."""
    config = read_config(folder / CONFIG_NAME)
    try:
        end_of_text_id, max_positions = int(config["eos_token_id"]), int(config["max_position_embeddings"])
        start_id = int(config.get(START_KEY, end_of_text_id))
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"{folder / CONFIG_NAME}: does not describe a model of ours ({exc})") from exc
    return CausalModel(
        start_id=start_id,
        stop_ids=tuple(dict.fromkeys([end_of_text_id, *SpecialIds.of(folder).ends])),
        vocab_size=model.vocab_size,
        max_positions=max_positions,
        device=device,
        rollout=rollout_of(model, folder),
    )


def rollout_of(model: LanguageModel, folder: Path) -> Callable[[int], Rollout]:
    """An empty rollout of any model, with room for so many positions. folder: where it is from, for messages."""
    if isinstance(model, HuggingFaceModel):
        _require_attention(model.inner, folder)
        return partial(HuggingFaceRollout, model.inner, model.vocab_size)
    return partial(TransformerRollout, _own(model))


_KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer"}
"""Layers of transformers' caches that rows can be taken out of; states of convolutions and recurrences cannot."""


class HuggingFaceRollout:
    """A rollout of a model of transformers, on its own cache; ids from vocab_size on are padding and not drawn."""

    def __init__(self, model: Any, vocab_size: int, capacity: int) -> None:  # noqa: ARG002 - its cache grows
        self._model = model
        self._vocab_size = vocab_size
        self._cache: Any = None
        self._ids_RT: Tensor | None = None
        can_keep_one = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._arguments = {"logits_to_keep": 1} if can_keep_one else {}

    def feed(self, ids_RT: Tensor) -> Tensor:
        """As in Rollout."""
        self._ids_RT = ids_RT if self._ids_RT is None else torch.cat([self._ids_RT, ids_RT], dim=1)
        new_RT = self._ids_RT if self._cache is None else ids_RT
        out = self._model(input_ids=new_RT, past_key_values=self._cache, use_cache=True, **self._arguments)
        self._cache = out.past_key_values
        last_RV: Tensor = out.logits[:, -1, : self._vocab_size].float()
        return last_RV

    def keep(self, rows: Tensor) -> None:
        """As in Rollout. A cache of which not all layers are keys and values is made anew, by going through all ids."""
        assert self._ids_RT is not None, "rows that were fed nothing are not dropped"
        self._ids_RT = self._ids_RT[rows]
        if all(type(layer).__name__ in _KEYS_AND_VALUES for layer in getattr(self._cache, "layers", [None])):
            self._cache.batch_select_indices(rows)
        else:
            self._cache = None


def _hugging_face_model(origin: Origin, tokenizer_json: Path, device: torch.device) -> CausalModel:
    """A causal model that transformers knows itself."""
    folder = origin.folder
    model = load_inner(origin)
    _require_attention(model, folder)
    found = model.generation_config.eos_token_id
    found = getattr(model.config, "eos_token_id", None) if found is None else found
    stop_ids = tuple(found) if isinstance(found, list) else (found,)
    if stop_ids == (None,):
        raise CheckpointError(f"{folder / CONFIG_NAME}: found no eos_token_id, so no text would end; set it")
    start_id = getattr(model.config, "bos_token_id", None)
    vocab_size = model.get_input_embeddings().num_embeddings
    if tokenizer_json.is_file():
        vocab_size = min(vocab_size, num_ids(tokenizer_json))
    return CausalModel(
        start_id=stop_ids[0] if start_id is None else start_id,
        stop_ids=stop_ids,
        vocab_size=vocab_size,
        max_positions=trained_positions(model.config.to_dict()),
        device=device,
        rollout=partial(HuggingFaceRollout, model.to(device), vocab_size),
        dtype=model.dtype,
    )


def _require_attention(inner: Any, folder: Path) -> None:
    if "past_key_values" not in inspect.signature(inner.forward).parameters:
        raise CheckpointError(
            f"{folder}: found a {inner.config.model_type}, which keeps no keys and values; expected a decoder with "
            "attention"
        )


def _own(model: LanguageModel) -> Transformer:
    assert isinstance(model, Transformer), "models are ours or of transformers"
    return model
