"""What a model's folder says of the model, read without torch."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from tristill.cache.arrays import LARGEST_VOCAB_SIZE
from tristill.cache.regular_file import read_json_object
from tristill.stages.errors import CheckpointError
from tristill.stages.models.config import ModelConfig
from tristill.stages.models.hugging_face_shape import HuggingFaceShape, Shape, llama_shape
from tristill.stages.quantize.config import QuantizeConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TOKENIZER_NAME = "tokenizer.json"
STUDENT_TYPE = "tristill_ternary"
START_KEY = "start_token_id"
"""In config.json: the id that began each window of a model of ours, where it was not its end of text."""


class Description(BaseModel):
    """`config.json` in our words; quantize is None for a model in full precision."""

    model_config = ConfigDict(frozen=True)

    shape: Shape
    vocab_size: Annotated[int, Field(ge=1, le=LARGEST_VOCAB_SIZE)]
    quantize: QuantizeConfig | None


def read_description(folder: Path) -> Description:
    """The description of the model in a folder of ours, or of transformers.

    A Llama of transformers that our own transformer computes is described as one of ours.
    """
    path = folder / CONFIG_NAME
    config = read_config(path)
    try:
        if not is_ours(config):
            vocab_size = config.get("text_config", config)["vocab_size"]
            shape = llama_shape(config) or HuggingFaceShape.of(config)
            return Description(shape=shape, vocab_size=vocab_size, quantize=None)
        quantize = QuantizeConfig(**config["quantize"]) if config.get("quantize") else None
        shape = HuggingFaceShape.of(config["hugging_face"]) if "hugging_face" in config else own_shape(config)
        return Description(shape=shape, vocab_size=config["vocab_size"], quantize=quantize)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise CheckpointError(f"{path}: does not describe a model of ours ({exc})") from exc


def own_shape(config: dict[str, Any]) -> ModelConfig:
    """The shape in a description that we wrote, of whatever type. Raises KeyError, TypeError or ValueError."""
    return ModelConfig(
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


def is_ours(config: dict[str, Any]) -> bool:
    """Whether our own code computes what this describes: a student, or a plain Llama that transformers did not sign."""
    if config.get("model_type") == STUDENT_TYPE:
        return True
    if "transformers_version" in config or "rope_parameters" in config:
        return False
    try:
        own_shape(config)
        plain = llama_shape({key: value for key, value in config.items() if key != "subln"})
    except (KeyError, TypeError, ValueError, OverflowError):
        return False
    return plain is not None


def read_config(path: Path) -> dict[str, Any]:
    """The description in a model folder, of ours or of transformers."""
    try:
        config = read_json_object(path)
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path}: found no model there; train it first, or give another folder") from exc
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path}: cannot be read as JSON ({exc})") from exc
    return config
