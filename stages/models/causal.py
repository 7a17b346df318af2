"""Any causal language model in a folder, ours or of transformers, ready to generate."""

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.errors import CheckpointError
from stages.models.description import CONFIG_NAME, read_config
from stages.models.folder import is_ours, load_model
from stages.models.generate import CausalModel, TransformerRollout
from stages.models.transformer import Transformer


def load_causal_model(folder: Path, device: torch.device) -> CausalModel:
    """The model in `folder`: a teacher or student of ours by our own code, anything else by transformers."""
    if not is_ours(read_config(folder / CONFIG_NAME)):
        return _load_hugging_face(folder, device)
    return causal_model(load_model(folder).to(device).eval(), folder, device)


def causal_model(model: Transformer, folder: Path, device: torch.device) -> CausalModel:
    """A model of ours that is on the device, packed or not, with what its folder says of it."""
    config = read_config(folder / CONFIG_NAME)
    try:
        end_of_text_id, max_positions = int(config["eos_token_id"]), int(config["max_position_embeddings"])
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"{folder / CONFIG_NAME}: does not describe a model of ours ({exc})") from exc
    return CausalModel(
        start_id=end_of_text_id,
        stop_ids=(end_of_text_id,),
        vocab_size=model.vocab_size,
        max_positions=max_positions,
        device=device,
        rollout=partial(TransformerRollout, model),
    )


class HuggingFaceRollout:
    """A rollout of a model of transformers, on its own cache."""

    def __init__(self, model: Any, capacity: int) -> None:  # noqa: ARG002 - its cache grows as it needs
        self._model = model
        self._cache: Any = None
        can_keep_one = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._arguments = {"logits_to_keep": 1} if can_keep_one else {}

    def feed(self, ids_RT: Tensor) -> Tensor:
        """As in Rollout."""
        out = self._model(input_ids=ids_RT, past_key_values=self._cache, use_cache=True, **self._arguments)
        self._cache = out.past_key_values
        last_RV: Tensor = out.logits[:, -1].float()
        return last_RV

    def keep(self, rows: Tensor) -> None:
        """As in Rollout."""
        self._cache.batch_select_indices(rows)


def _load_hugging_face(folder: Path, device: torch.device) -> CausalModel:
    """A causal model that transformers knows itself: safetensors only, no code from the folder, no network."""
    try:
        import transformers
    except ImportError as exc:
        raise CheckpointError(
            f"{folder}: is no model of ours, and transformers, which may know it, is not installed; "
            "run `pip install -e '.[hf]'`"
        ) from exc
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as exc:  # the library raises many kinds: config, weights, code of its own wanted
        first_line = (str(exc).splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder}: transformers cannot load it as a causal language model ({type(exc).__name__}: {first_line})"
        ) from exc
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise CheckpointError(
            f"{folder}: found a {model.config.model_type}, which keeps no keys and values; expected a decoder with "
            "attention"
        )
    found = model.generation_config.eos_token_id
    found = getattr(model.config, "eos_token_id", None) if found is None else found
    stop_ids = tuple(found) if isinstance(found, list) else (found,)
    if stop_ids == (None,):
        raise CheckpointError(f"{folder / CONFIG_NAME}: found no eos_token_id, so no text would end; set it")
    start_id = getattr(model.config, "bos_token_id", None)
    return CausalModel(
        start_id=stop_ids[0] if start_id is None else start_id,
        stop_ids=stop_ids,
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_positions=getattr(model.config, "max_position_embeddings", None),
        device=device,
        rollout=partial(HuggingFaceRollout, model.to(device).eval()),
    )
