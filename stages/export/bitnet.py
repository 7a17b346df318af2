"""Writes a student in the packed layout of transformers' BitNet integration: 2 bits per weight, a scale per matrix.

Source: transformers, `integrations/bitnet.py`, class BitLinear: y = Q_a(x) T^T / weight_scale, so that weight_scale is
the inverse of ours. Its other class, AutoBitLinear, multiplies; the description names the class.
"""

from pathlib import Path

import torch
from torch import Tensor

from tristill.stages.errors import ExportError
from tristill.stages.export.hugging_face import plain_tensors, write_folder
from tristill.stages.export.student import Student, plain_linears, require_ternary
from tristill.stages.models.transformer import Transformer

_PER_BYTE = 4


def write_bitnet(student: Student, folder: Path) -> None:
    """Write the folder. Raises ExportError, with all reasons, for a student that the layout cannot hold."""
    model = student.model
    refuse_bitnet(model)
    packed: dict[str, Tensor] = {}
    for name, layer in model.quantized_linears().items():
        ternary = layer.ternary()
        packed[f"{name}.weight"] = pack_trits(ternary.trits_OI)
        packed[f"{name}.weight_scale"] = ternary.scale_RG.reshape(1).reciprocal()
    tensors = plain_tensors(model) | packed
    # The head is named although nothing asks for it when it is tied: a list takes the place of transformers' own.
    in_full = [*plain_linears(model), *["lm_head"] * ("lm_head.weight" not in tensors)]
    quantization = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": in_full,
        "use_rms_norm": False,
        "rms_norm_eps": model.config.norm_eps,
    }
    write_folder(student, folder, tensors, {"quantization_config": quantization})


def refuse_bitnet(model: Transformer) -> None:
    """Raises ExportError, with all reasons, for a model that the packed layout cannot hold."""
    require_ternary(model, "the packed layout of transformers")
    assert model.quantize is not None, "a ternary one has a config"
    problems = []
    if model.quantize.scale_per != "tensor":
        problems.append(
            f"student.quantize.scale_per: found {model.quantize.scale_per!r}, but the layout has one scale per matrix; "
            "train with scale_per = 'tensor', or use `--format gguf` (row, group-256) or `--format hf` (any)"
        )
    uneven = {n: layer.out_features for n, layer in model.quantized_linears().items() if layer.out_features % _PER_BYTE}
    if uneven:
        name, rows = next(iter(uneven.items()))
        more = f" (and {len(uneven) - 1} more)" if len(uneven) > 1 else ""
        problems.append(
            f"{name}{more}: found {rows} rows, expected a multiple of {_PER_BYTE}, as {_PER_BYTE} rows share bytes"
        )
    if problems:
        raise ExportError("the packed layout of transformers cannot hold this student: " + "; ".join(problems))


def pack_trits(trits_OI: Tensor) -> Tensor:
    """(O / 4, I) uint8: trit + 1 in two bits; byte row r holds rows r, r + O/4, r + O/2, r + 3 O/4, low bits first."""
    codes_4RI = (trits_OI + 1).to(torch.uint8).unflatten(0, (_PER_BYTE, -1))  # type: ignore[no-untyped-call]
    packed_RI = torch.zeros_like(codes_4RI[0])
    for part, codes_RI in enumerate(codes_4RI):
        packed_RI |= codes_RI << 2 * part
    return packed_RI


def unpack_trits(packed_RI: Tensor) -> Tensor:
    """The inverse of `pack_trits`, int8."""
    parts = [(packed_RI >> 2 * part & 3) for part in range(_PER_BYTE)]
    return torch.cat(parts).to(torch.int8) - 1
