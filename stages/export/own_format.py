"""Writes a student of an architecture of transformers as just that, its weights dequantised, and reads it back."""

import json
from pathlib import Path
from typing import Any

import torch

from cache.atomic import sync_file, write_atomically
from stages.data.tokenizer import load_tokenizer
from stages.errors import ExportError
from stages.models.description import TOKENIZER_NAME
from stages.models.hugging_face import HuggingFaceModel
from stages.models.hugging_face_folder import load_inner
from stages.models.origin import Origin


def write_own_format(
    model: HuggingFaceModel, folder: Path, tokenizer_json: Path, context_length: int, end_of_text_id: int
) -> None:
    """Write the folder as transformers itself saves such a model; linear layers it had transposed are so again."""
    inner = model.plain_inner()
    inner.config.architectures = [type(inner).__name__]
    for settings in (inner.config, inner.generation_config):
        settings.eos_token_id = settings.bos_token_id = end_of_text_id
        settings.pad_token_id = None
    inner.save_pretrained(folder)
    for path in folder.iterdir():
        sync_file(path)
    write_atomically(folder / TOKENIZER_NAME, tokenizer_json.read_bytes())
    end_of_text = load_tokenizer(tokenizer_json).id_to_token(end_of_text_id)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    write_atomically(folder / "tokenizer_config.json", (json.dumps(about, indent=2) + "\n").encode())


def compare_own_format(model: HuggingFaceModel, folder: Path) -> None:
    """Raises ExportError unless transformers reads the values that the student multiplies by, bit for bit."""
    back = load_inner(Origin(folder=folder))
    expected: dict[str, Any] = model.plain_inner().state_dict()
    found: dict[str, Any] = back.state_dict()
    odd = [name for name in expected.keys() | found.keys() if not _same(expected.get(name), found.get(name))]
    for name, layer in model.quantized_linears().items():  # not by way of the same copy
        weight = found.get(f"{name}.weight", found.get(name))
        values = layer.quantized_weight() if name not in model.transposed else layer.quantized_weight().T
        odd += [] if _same(weight, values[: None if weight is None else len(weight)]) else [name]
    if odd:
        raise ExportError(f"{folder}: {min(odd)}: found other values than the student's")


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
