"""What a model's folder says of the model, read without torch."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cache.hashing import fingerprint_of, sha256_of_file
from stages.errors import CheckpointError
from stages.models.config import ModelConfig
from stages.quantize.config import QuantizeConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TOKENIZER_NAME = "tokenizer.json"
STUDENT_TYPE = "tristill_ternary"


class Description(BaseModel):
    """`config.json` in our words; quantize is None for a model in full precision."""

    model_config = ConfigDict(frozen=True)

    shape: ModelConfig
    vocab_size: int
    quantize: QuantizeConfig | None


def read_description(folder: Path) -> Description:
    """The description of the model in a folder that `save_model` wrote."""
    path = folder / CONFIG_NAME
    config = read_config(path)
    try:
        shape = ModelConfig(
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            mlp_width=config["intermediate_size"],
            tied_embeddings=config["tie_word_embeddings"],
            rope_theta=config["rope_theta"],
            norm_eps=config["rms_norm_eps"],
            subln=config.get("subln", False),
        )
        quantize = QuantizeConfig(**config["quantize"]) if config["model_type"] == STUDENT_TYPE else None
        return Description(shape=shape, vocab_size=config["vocab_size"], quantize=quantize)
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"{path}: does not describe a model of ours ({exc})") from exc


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over the architecture and the weights."""
    return fingerprint_of([sha256_of_file(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME)])


def read_config(path: Path) -> dict[str, Any]:
    """The description in a model folder, of ours or of transformers."""
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path}: found no model there; train it first, or give another folder") from exc
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path}: cannot be read as JSON ({exc})") from exc
    return config
