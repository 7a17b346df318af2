"""Shape of a model, our own Llama or any of transformers, and what its folder says of it; loads no torch."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tristill.cache.arrays import LARGEST_VOCAB_SIZE
from tristill.cache.hashing import canonical_json
from tristill.cache.regular_file import read_json_object
from tristill.stages.errors import CheckpointError
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.settings import Section


class ModelConfig(Section):
    """A Llama-compatible transformer: RMSNorm, RoPE, SwiGLU, grouped-query attention.

    The size of the vocabulary is the tokenizer's.
    """

    width: Annotated[int, Field(ge=8, description="D, width of the residual stream; multiples of 256 export to GGUF")]
    layers: Annotated[int, Field(ge=1, le=10_000, description="number of blocks")]
    heads: Annotated[int, Field(ge=1, description="attention heads; their size is width / heads, an even number")]
    kv_heads: Annotated[
        int | None, Field(ge=1, description="key and value heads, a divisor of heads; none gives one per head")
    ] = None
    mlp_width: Annotated[int, Field(ge=8, description="inner width of the SwiGLU MLP")]
    tied_embeddings: Annotated[bool, Field(description="the output head is the embedding matrix")] = True
    rope_theta: Annotated[float, Field(gt=0, description="base of the rotary position embedding")] = 10000.0
    norm_eps: Annotated[float, Field(gt=0, description="epsilon of every RMSNorm")] = 1e-5
    subln: Annotated[
        bool, Field(description="SubLN: an RMSNorm before the output projections of attention and MLP (BitNet)")
    ] = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads or self.head_width % 2:
            raise ValueError(f"width ({self.width}) must be an even multiple of heads ({self.heads})")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.num_kv_heads})")
        return self

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of one block, by their names in a Hugging Face Llama."""
        kv_width = self.num_kv_heads * self.head_width
        return {
            "self_attn.q_proj": (self.width, self.width),
            "self_attn.k_proj": (kv_width, self.width),
            "self_attn.v_proj": (kv_width, self.width),
            "self_attn.o_proj": (self.width, self.width),
            "mlp.gate_proj": (self.mlp_width, self.width),
            "mlp.up_proj": (self.mlp_width, self.width),
            "mlp.down_proj": (self.width, self.mlp_width),
        }

    def all_linear_shapes(self, vocab_size: int) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer by its full name, the output head last."""
        blocks = {
            f"model.layers.{layer}.{name}": shape
            for layer in range(self.layers)
            for name, shape in self.linear_shapes.items()
        }
        return {**blocks, "lm_head": (vocab_size, self.width)}

    def parameters(self, vocab_size: int) -> int:
        """All parameters."""
        norms = self.layers * (2 * self.width + (self.width + self.mlp_width) * self.subln) + self.width
        linear = self.layers * sum(rows * columns for rows, columns in self.linear_shapes.values())
        return linear + norms + vocab_size * self.width * (1 if self.tied_embeddings else 2)


_NOT_THE_SHAPE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers")
_KINDS_OF_BLOCKS = ("layers_block_type", "layer_types")


class HuggingFaceShape(BaseModel):
    """What decides the computation; where the model came from and in which dtype it was saved does not.

    config_json: canonical JSON of these keys.
    """

    model_config = ConfigDict(frozen=True)

    config_json: str

    @classmethod
    def of(cls, config: dict[str, Any]) -> "HuggingFaceShape":
        """From the content of a `config.json`. Raises ValueError if it names no kind of model, or no depth."""
        if not isinstance(config.get("model_type"), str):
            raise ValueError("found no model_type")  # noqa: TRY004 - read from a file
        kept = {key: _encoded(value) for key, value in config.items() if key not in _NOT_THE_SHAPE}
        shape = cls(config_json=canonical_json(kept))
        if shape.layers < 1:
            raise ValueError(f"found {shape.layers} blocks, expected at least 1")
        return shape

    @property
    def config(self) -> dict[str, Any]:
        """As transformers reads it."""
        config: dict[str, Any] = json.loads(self.config_json)
        return config

    @property
    def text(self) -> dict[str, Any]:
        """The part of it that describes the language model, where others see or hear."""
        config = self.config
        text: dict[str, Any] = config.get("text_config") or config
        return text

    def of_vocabulary(self, vocab_size: int) -> "HuggingFaceShape":
        """The same with so many outputs and embeddings."""
        config = self.config
        text = config.get("text_config") or config
        text["vocab_size"] = vocab_size
        beyond = [key for key, value in text.items() if key.endswith("_token_id") and _is_beyond(value, vocab_size)]
        for key in beyond:
            text[key] = None
        return HuggingFaceShape.of(config)

    @property
    def kind(self) -> str:
        """The name of the architecture: llama, qwen3, gpt2 .."""
        return str(self.config["model_type"])

    @property
    def layers(self) -> int:
        """Number of blocks. Raises ValueError if the description does not say."""
        text = self.text
        found = [text[name] for name in _DEPTHS if isinstance(text.get(name), int)]
        found += [len(text[name]) for name in _KINDS_OF_BLOCKS if isinstance(text.get(name), list)]
        if not found:
            raise ValueError(f"found none of {', '.join(_DEPTHS)}, expected the number of blocks")
        return int(found[0])

    def numbers(self) -> dict[str, Any]:
        """As of a Section: what results depend on."""
        return {"hugging_face": self.config}


def _encoded(value: Any) -> Any:
    """The same, numbers that JSON does not have (`time_step_limit` of Mamba 2) as transformers writes them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    return [_encoded(item) for item in value] if isinstance(value, list | tuple) else value


def _is_beyond(token_ids: Any, vocab_size: int) -> bool:
    """Of a special id, or a list of them."""
    found = token_ids if isinstance(token_ids, list) else [token_ids]
    return any(isinstance(token_id, int) and token_id >= vocab_size for token_id in found)


Shape = ModelConfig | HuggingFaceShape
"""Of a model of our own transformer, or of any that transformers knows."""


def llama_shape(config: dict[str, Any]) -> ModelConfig | None:
    """The shape of our own transformer that computes the same as this Llama of transformers; None if there is none.

    Llamas with biases, scaled rotations, another activation or code of their own are none of ours, nor are those with a
    setting that sounds like computation and is not known here. transformers 5 keeps the base of the rotation in
    `rope_parameters`, earlier ones in `rope_theta` and `rope_scaling`.
    """
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not isinstance(width, int) or not isinstance(heads, int) or config.get("model_type") != "llama":
        return None
    rope = config.get("rope_parameters") or {}
    is_plain = (
        (config.get("head_dim") or width // max(heads, 1)) * heads == width
        and not config.get("auto_map")
        and not config.get("quantization_config")
        and _is_plain_rotation(rope)
        and _is_plain_rotation(config.get("rope_scaling") or {})
        and all(_changes_nothing(key, value) for key, value in config.items() if key not in _OF_EVERY_LLAMA)
    )
    if not is_plain:
        return None
    try:
        return ModelConfig(
            width=width,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            mlp_width=config["intermediate_size"],
            tied_embeddings=config.get("tie_word_embeddings", False),
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
            norm_eps=config.get("rms_norm_eps", 1e-6),
        )
    except (KeyError, ValueError):
        return None


_OF_EVERY_LLAMA = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "attention_dropout", "attn_implementation",
}  # fmt: skip
"""Settings that `llama_shape` takes over, or that change nothing in evaluation mode."""
_COMPUTATION = re.compile(
    "act|attn|attention|bias|cap|expert|head|layer|logit|moe|multipl|norm|partial|pretraining_tp|residual|rope|rotary|"
    "scal|sliding|soft|window"
)
_PLAIN_VALUES = ("silu", "swish", "default", "full_attention")


def _changes_nothing(key: str, value: Any) -> bool:
    """Whether a setting is none of the computation, or says what our transformer does anyway."""
    if key.startswith("_") or not _COMPUTATION.search(key):
        return True
    if isinstance(value, list):
        return all(item in _PLAIN_VALUES for item in value)
    return not value or value in _PLAIN_VALUES or (value == 1 and value is not True)


def _is_plain_rotation(rope: Any) -> bool:
    return (
        isinstance(rope, dict)
        and rope.get("rope_type", rope.get("type", "default")) == "default"
        and float(rope.get("partial_rotary_factor") or 1.0) == 1.0
        and not any(isinstance(value, dict) for value in rope.values())
    )


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
