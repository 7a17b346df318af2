"""Writes a student of an architecture of transformers as just that, its weights dequantised, and reads it back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tristill.cache.atomic import sync_file
from tristill.stages.errors import ExportError
from tristill.stages.models.hugging_face import HuggingFaceModel
from tristill.stages.models.hugging_face_folder import load_inner
from tristill.stages.models.origin import Origin


def write_own_format(model: HuggingFaceModel, folder: Path, special: Mapping[str, int]) -> None:
    """Write the folder as transformers itself saves such a model; linear layers it had transposed are so again.

    special: ids of tokens, by their keys in a description.
    """
    inner = model.plain_inner()
    inner.config.architectures = [type(inner).__name__]
    for settings in (inner.config, inner.generation_config):
        settings.pad_token_id = None
        for key, token_id in special.items():
            setattr(settings, key, token_id)
    inner.save_pretrained(folder)
    for path in folder.iterdir():
        sync_file(path)


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
