"""Writes a student as a folder of transformers, its weights dequantised: any code, no rounding of activations."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tristill.cache.atomic import write_atomically
from tristill.stages.data.tokenizer import load_tokenizer
from tristill.stages.export.own_format import write_own_format
from tristill.stages.export.student import Student
from tristill.stages.models.checkpoint import hugging_face_config
from tristill.stages.models.companions import write_tokenizer
from tristill.stages.models.description import CONFIG_NAME, WEIGHTS_NAME
from tristill.stages.models.hugging_face import HuggingFaceModel
from tristill.stages.models.transformer import Transformer


def write_hugging_face(student: Student, folder: Path) -> None:
    """Write the folder: `LlamaForCausalLM`, or `BitNetForCausalLM` with SiLU for a student with SubLN.

    A student of another architecture goes out as that one. A quantised head has an output matrix of its own, even where
    the student shares it with the embedding.
    """
    if isinstance(student.loaded, HuggingFaceModel):
        write_own_format(student.loaded, folder, student.special)
        write_exported_tokenizer(student, folder)
        return
    layers = student.model.quantized_linears()
    own = {f"{name}.weight": layer.quantized_weight().detach().float() for name, layer in layers.items()}
    write_folder(student, folder, plain_tensors(student.model) | own, {})


def plain_tensors(model: Transformer) -> dict[str, Tensor]:
    """All that is not quantised, by name, float32; a tied head is left out."""
    quantized = model.quantized_linears()
    return {
        name: parameter.detach().float()
        for name, parameter in model.named_parameters()
        if not name.endswith(".log_step") and name.removesuffix(".weight") not in quantized
    }


def write_folder(student: Student, folder: Path, tensors: Mapping[str, Tensor], further: Mapping[str, Any]) -> None:
    """Write weights, description (`further` keys beside those of the shape) and tokenizer into an empty folder."""
    model = student.model
    shape = model.config.model_copy(update={"tied_embeddings": "lm_head.weight" not in tensors})
    with torch.device("meta"):
        plain = Transformer(shape, model.vocab_size)
    config = hugging_face_config(plain, student.context_length, student.special)
    if shape.subln:  # transformers' Llama has no such norms, and its BitNet is a Llama with them
        config |= {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet"}
    _write_json(folder / CONFIG_NAME, config | dict(further))
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS_NAME, safetensors.torch.save(stored, metadata={"format": "pt"}))
    write_exported_tokenizer(student, folder)


def write_exported_tokenizer(student: Student, folder: Path) -> None:
    """Write the tokenizer and all that goes with it, as any of transformers' fast tokenizers.

    transformers would make some of its classes anew from vocabulary and merges; what the student learned is the file.
    """
    write_tokenizer(student.tokenizer_json, folder)
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_bytes()) if path.is_file() else {}
    end_of_text = load_tokenizer(student.tokenizer_json).id_to_token(student.end_of_text_id)
    about = {
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
        **known,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": student.context_length,
    }
    _write_json(path, about)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode("utf-8"))
