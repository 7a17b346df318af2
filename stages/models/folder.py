"""A model's folder: `config.json`, `model.safetensors`, `tokenizer.json`; a teacher's is a Hugging Face Llama."""

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cache.atomic import write_atomically
from stages.errors import CheckpointError, StageError
from stages.models.description import (
    CONFIG_NAME,
    STUDENT_TYPE,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    model_fingerprint,
    read_description,
)
from stages.models.transformer import Transformer

__all__ = [
    "CONFIG_NAME",
    "TOKENIZER_NAME",
    "WEIGHTS_NAME",
    "hugging_face_config",
    "load_model",
    "load_weights",
    "model_fingerprint",
    "pick_device",
    "read_tensors",
    "save_model",
]


def save_model(
    folder: Path, model: Transformer, tokenizer_json: Path, context_length: int, end_of_text_id: int
) -> None:
    """Write the folder. A full-precision model loads in transformers as `LlamaForCausalLM`.

    A quantised model is saved with its latent full-precision weights, and its learned steps, under a model type of our
    own, so that no other program takes those for the weights to run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_json.resolve() != (folder / TOKENIZER_NAME).resolve():
        shutil.copyfile(tokenizer_json, folder / TOKENIZER_NAME)
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length}
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / CONFIG_NAME, hugging_face_config(model, context_length, end_of_text_id))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tied_embeddings:
        del tensors["lm_head.weight"]
    write_atomically(folder / WEIGHTS_NAME, safetensors.torch.save(tensors, metadata={"format": "pt"}))


def load_model(folder: Path) -> Transformer:
    """The model in a folder that `save_model` wrote, on the CPU, in float32."""
    description = read_description(folder)
    model = Transformer(description.shape, description.vocab_size, description.quantize)
    load_weights(model, read_tensors(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
    return model


def is_ours(config: dict[str, Any]) -> bool:
    """Whether `save_model` wrote this description: a student, or a Llama that transformers did not sign."""
    kind = config.get("model_type")
    return kind == STUDENT_TYPE or (kind == "llama" and "transformers_version" not in config)


def load_weights(model: Transformer, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy tensors into a model; refuses missing, unknown and wrongly shaped ones by name."""
    if model.config.tied_embeddings and "model.embed_tokens.weight" in tensors:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        detail = "; ".join(f"{name}: found {found.get(name)}, expected {expected.get(name)}" for name in odd[:3])
        raise CheckpointError(f"{where}: {len(odd)} tensors do not fit the model: {detail}")
    model.load_state_dict(tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as exc:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({exc})") from exc


def pick_device(name: str | None) -> torch.device:
    """The named device; CUDA if there is one, else the CPU, when none is named."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:  # torch says it either way
        raise StageError(f"device {name!r}: cannot be used here ({str(exc).splitlines()[0]}); try cpu or cuda") from exc
    return device


def hugging_face_config(model: Transformer, context_length: int, end_of_text_id: int) -> dict[str, Any]:
    """The content of `config.json` for a model of this shape and code."""
    config = model.config
    description: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "torch_dtype": "float32",
    }
    if model.quantize is not None:
        description |= {
            "architectures": ["TristillTernaryForCausalLM"],
            "model_type": STUDENT_TYPE,
            "quantize": model.quantize.model_dump(exclude_none=True),
        }
    if config.subln:
        description["subln"] = True
    return description


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode("utf-8"))
