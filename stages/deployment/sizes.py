"""Bytes of a model on disk."""

from pathlib import Path

import safetensors.torch
import torch

from tristill.stages.models.checkpoint import saved_tensors
from tristill.stages.models.language_model import LanguageModel
from tristill.stages.models.origin import load_origin, model_files


def weights_bytes(folder: Path) -> int:
    """Of the weights of the model in a folder, wherever they are: latent ones, of a student."""
    origin = load_origin(folder)
    files = model_files(folder if origin is None else origin.folder)
    return sum(file.num_bytes for file in files if file.name.endswith(".safetensors"))


def bytes_of(model: LanguageModel, dtype: torch.dtype | None = None) -> int:
    """Of a safetensors file of the model, whole numbers as they are and all others in a type; None: as they are too.

    Of a packed model in fp16 that is 2 bits a ternary weight and 16 bits of everything else.
    """
    tensors = {
        name: tensor.to(dtype).contiguous() if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in saved_tensors(model).items()
    }
    return len(safetensors.torch.save(tensors))
