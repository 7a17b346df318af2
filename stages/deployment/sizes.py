"""Bytes of a model on disk."""

from pathlib import Path

import safetensors.torch
from torch import Tensor

from stages.models.description import WEIGHTS_NAME
from stages.models.transformer import Transformer


def fp32_bytes(folder: Path) -> int:
    """Of the weights in a model folder: latent ones, of a student."""
    return (folder / WEIGHTS_NAME).stat().st_size


def fp16_bytes(model: Transformer) -> int:
    """Of a safetensors file of the model, whole numbers as they are and all others in fp16.

    Of a packed model that is 2 bits a ternary weight and 16 bits of everything else.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not (name == "lm_head.weight" and model.config.tied_embeddings):
            tensors[name] = tensor.half().contiguous() if tensor.is_floating_point() else tensor
    return len(safetensors.torch.save(tensors))
