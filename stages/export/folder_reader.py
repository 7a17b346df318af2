"""Reads an exported folder back into our transformer, without transformers."""

from pathlib import Path

import torch
from torch import Tensor

from tristill.stages.errors import ExportError, StageError
from tristill.stages.export.bitnet import unpack_trits
from tristill.stages.export.rounding import TorchRuntime, round_before
from tristill.stages.models.checkpoint import load_weights, read_tensors
from tristill.stages.models.description import CONFIG_NAME, WEIGHTS_NAME, own_shape, read_config
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.activations import absmax_quantize

_SCALE = ".weight_scale"


def read_folder(folder: Path) -> TorchRuntime:
    """The model in a folder that `write_hugging_face` or `write_bitnet` wrote; packed layers round their inputs.

    Raises ExportError for one that cannot be read or does not fit its description.
    """
    try:
        config = read_config(folder / CONFIG_NAME)
        stored = read_tensors(folder / WEIGHTS_NAME)
        packed = {name.removesuffix(_SCALE) for name in stored if name.endswith(_SCALE)}
        is_divided = config.get("quantization_config", {}).get("linear_class") == "bitlinear"
        tensors: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            layer = name.removesuffix(".weight")
            if layer in packed:
                scale = stored[layer + _SCALE]
                tensors[name] = unpack_trits(tensor) / scale if is_divided else unpack_trits(tensor) * scale
            elif not name.endswith(_SCALE):
                tensors[name] = tensor.to(torch.float32)
        model = Transformer(own_shape(config), config["vocab_size"]).eval()
        load_weights(model, tensors, folder / WEIGHTS_NAME)
    except (StageError, KeyError, TypeError, ValueError) as exc:
        raise ExportError(f"{folder}: cannot be read back ({exc})") from exc
    round_before(model, packed - {"lm_head"}, absmax_quantize)
    return TorchRuntime("the files, read back", model, absmax_quantize if "lm_head" in packed else None)
