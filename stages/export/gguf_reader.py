"""Reads a GGUF file back by gguf's own reader, into our transformer, and compares it with what it was to hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tristill.stages.errors import ExportError
from tristill.stages.export.gguf import exported_tensors
from tristill.stages.export.gguf_layout import architecture, halves, our_name, rotated_heads
from tristill.stages.export.gguf_tokenizer import ADDED_ROLES, ROLE_KEYS, GgufTokenizer, TokenType, gguf_tokenizer
from tristill.stages.export.packages import import_gguf
from tristill.stages.export.student import plain_transformer
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.transformer import Transformer

_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class GgufFile:
    """What a file of ours says, in our words."""

    config: ModelConfig
    context_length: int
    tokenizer: GgufTokenizer
    tensors: dict[str, Tensor]
    """Values by our names, float32, rows in our order."""
    ternary: frozenset[str]
    """Names of those in ternary blocks."""

    def model(self) -> Transformer:
        """A transformer with these weights, in full precision."""
        return plain_transformer(self.config, self.tensors)


def read_gguf(path: Path) -> GgufFile:
    """The file, whole. Raises ExportError for one that is not whole or not one of ours."""
    gguf = import_gguf()
    try:
        reader = gguf.GGUFReader(path)
        arch = _value(reader, "general.architecture")
        found = {our_name(tensor.name) or tensor.name: tensor for tensor in reader.tensors}
        config = ModelConfig(
            width=_value(reader, f"{arch}.embedding_length"),
            layers=_value(reader, f"{arch}.block_count"),
            heads=_value(reader, f"{arch}.attention.head_count"),
            kv_heads=_value(reader, f"{arch}.attention.head_count_kv"),
            mlp_width=_value(reader, f"{arch}.feed_forward_length"),
            tied_embeddings="lm_head.weight" not in found,
            rope_theta=_value(reader, f"{arch}.rope.freq_base"),
            norm_eps=_value(reader, f"{arch}.attention.layer_norm_rms_epsilon"),
            subln=arch == "bitnet",
        )
        tensors = {name: _values(gguf, name, tensor, config) for name, tensor in found.items()}
        tokenizer = GgufTokenizer(
            pre=_value(reader, "tokenizer.ggml.pre"),
            tokens=tuple(_value(reader, "tokenizer.ggml.tokens")),
            types=tuple(TokenType(kind) for kind in _value(reader, "tokenizer.ggml.token_type")),
            merges=tuple(_value(reader, "tokenizer.ggml.merges")),
            special={
                role: _value(reader, key)
                for role, name in ROLE_KEYS.items()
                if reader.get_field(key := f"tokenizer.ggml.{name}_token_id")
            },
            adds={role: _value(reader, f"tokenizer.ggml.add_{role}_token") for role in ADDED_ROLES},
            templates={
                key.removeprefix(_TEMPLATE).removeprefix(".") or "default": _value(reader, key)
                for key in reader.fields
                if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
            },
        )
        return GgufFile(
            config=config,
            context_length=_value(reader, f"{arch}.context_length"),
            tokenizer=tokenizer,
            tensors=tensors,
            ternary=frozenset(name for name, tensor in found.items() if tensor.tensor_type.name.startswith("TQ")),
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as exc:
        raise ExportError(f"{path}: cannot be read as a GGUF file of a student ({type(exc).__name__}: {exc})") from exc


def check_gguf(
    path: Path, model: Transformer, tokenizer_json: Path, *, context_length: int, end_of_text_id: int
) -> GgufFile:
    """The file, read back; every trit is the model's, and every scale the model's rounded to float16.

    So are all other values, the shape, the tokens and the merges. Raises ExportError with what differs.
    """
    file = read_gguf(path)
    expected = {name: (values, is_ternary) for name, values, is_ternary in exported_tensors(model)}
    odd = sorted(expected.keys() ^ file.tensors.keys())
    wrong = [f"{name}: found {'no' if name in expected else 'a'} tensor of that name" for name in odd]
    for name in expected.keys() & file.tensors.keys():
        values, is_ternary = expected[name]
        found = file.tensors[name]
        if found.shape != values.shape or not torch.equal(found, values):
            num_wrong = int((found != values).sum()) if found.shape == values.shape else values.numel()
            wrong.append(f"{name}: found {num_wrong} of {values.numel()} values other than the student's")
        if is_ternary != (name in file.ternary):
            wrong.append(f"{name}: found it {'not ' * is_ternary}in ternary blocks")
    shape = model.config.model_copy(
        update={
            "kv_heads": model.config.num_kv_heads,
            "tied_embeddings": "lm_head.weight" not in expected,
            "rope_theta": float(np.float32(model.config.rope_theta)),
            "norm_eps": float(np.float32(model.config.norm_eps)),
        }
    )
    said = {
        "shape": (file.config, shape),
        "context length": (file.context_length, context_length),
        "tokenizer": (file.tokenizer, gguf_tokenizer(tokenizer_json, model.vocab_size, end_of_text_id)),
    }
    wrong += [f"{what}: found another than was written" for what, (found, wanted) in said.items() if found != wanted]
    if wrong:
        raise ExportError(f"{path}: is not what was written: {'; '.join(wrong[:4])}")
    assert architecture(file.config) == architecture(shape), "follows from the shape"
    return file


def _values(gguf: Any, name: str, tensor: Any, config: ModelConfig) -> Tensor:
    values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    values = values.reshape([int(size) for size in reversed(tensor.shape)])
    heads = rotated_heads(name, config)
    return values if heads is None else halves(values, heads).contiguous()


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise KeyError(key)
    return field.contents()
