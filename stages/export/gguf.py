"""Writes a student as a GGUF file: ternary blocks, tokenizer and all that llama.cpp wants to know."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tristill.cache.atomic import names_file, sync_folder
from tristill.stages.errors import ExportError
from tristill.stages.export.formats import BLOCK_COLUMNS, TernaryType
from tristill.stages.export.gguf_layout import architecture, gguf_name, interleave, rotated_heads
from tristill.stages.export.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from tristill.stages.export.packages import import_gguf
from tristill.stages.export.student import plain_linears, require_ternary
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.quantizer import TernaryWeight, group_columns

_FP16_ROUNDING = 2.0**-11
"""Half the distance of neighbouring float16 numbers, relative: what a normal number loses at most."""
_FP16_LARGEST = 65504.0


def write_gguf(
    model: Transformer,
    tokenizer_json: Path,
    path: Path,
    kind: TernaryType,
    *,
    context_length: int,
    end_of_text_id: int,
    name: str = "student",
    about: Mapping[str, str] | None = None,
) -> None:
    """Write the file in one step: ternary layers as `kind`, other matrices in F16, norms in F32.

    Every scale is rounded to float16, which the blocks hold; trits are kept exactly. `about`: further metadata by key.
    Raises ExportError, with all reasons, for a model or a tokenizer that the format cannot hold.
    """
    gguf = import_gguf()
    refuse_gguf(model)
    tokenizer = gguf_tokenizer(tokenizer_json, model.vocab_size, end_of_text_id)
    partial = path.with_name(f".{path.name}.partial")
    writer = gguf.GGUFWriter(partial, architecture(model.config))
    try:
        _add_shape(writer, model, context_length)
        writer.add_name(name)
        writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{kind}"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in (about or {}).items():
            writer.add_string(key, value)
        _add_tokenizer(writer, tokenizer)
        for tensor_name, values, tensor_type in _tensors(model, kind):
            raw_type = gguf.GGMLQuantizationType[tensor_type]
            writer.add_tensor(tensor_name, gguf.quants.quantize(values, raw_type), raw_dtype=raw_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        for file in writer.fout or []:
            file.flush()
            os.fsync(file.fileno())
        writer.close()
        partial.replace(path)
    except BaseException as exc:
        with suppress(OSError):  # of what is still to be written
            writer.close()
        partial.unlink(missing_ok=True)
        if isinstance(exc, OSError) and exc.errno is None:  # numpy counts what it could not write, and says no more
            raise ExportError(
                f"{path}: could not be written whole ({exc}), as on a full disk; free some space and run the same "
                "command again"
            ) from exc
        with names_file(path):
            raise
    sync_folder(path.parent)


def refuse_gguf(model: Transformer, *, is_trained: bool = True) -> None:
    """Raises ExportError, with all reasons, for a model that ternary blocks of llama.cpp cannot hold.

    is_trained: whether its scales are those that are to be written; else they are not looked at.
    """
    require_ternary(model, "a GGUF file of ternary blocks")
    assert model.quantize is not None, "a ternary one has a config"
    problems = []
    group = group_columns(model.quantize.scale_per)
    if 1 < group < BLOCK_COLUMNS:
        problems.append(
            f"student.quantize.scale_per: found {model.quantize.scale_per!r}, but a block has one scale for "
            f"{BLOCK_COLUMNS} columns; expected tensor, row or group-256"
        )
    layers = model.quantized_linears()
    uneven: dict[tuple[int, str], list[str]] = {}
    for layer_name, layer in layers.items():
        if layer.in_features % BLOCK_COLUMNS:
            field = "mlp_width" if layer_name.endswith("down_proj") else "width"
            uneven.setdefault((layer.in_features, field), []).append(layer_name)
    for (columns, field), names in uneven.items():
        serve = {max(columns // BLOCK_COLUMNS, 1) * BLOCK_COLUMNS, -(-columns // BLOCK_COLUMNS) * BLOCK_COLUMNS}
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        problems.append(
            f"{names[0]}{more}: found rows of {columns} weights, expected a multiple of {BLOCK_COLUMNS}; the next "
            f"that serve are {' and '.join(map(str, sorted(serve)))}: set student.model.{field} to one of them"
        )
    if "lm_head" in layers and model.config.subln:
        problems.append(
            "lm_head: found it quantised, but llama.cpp's bitnet, which has the norms of SubLN, knows no output matrix "
            "beside the embedding; leave lm_head out of student.quantize.layers"
        )
    if model.config.subln and not model.config.tied_embeddings:
        problems.append(
            "student.model.tied_embeddings: found false, but llama.cpp's bitnet, which has the norms of SubLN, knows "
            "no output matrix beside the embedding; set it to true"
        )
    for layer_name, layer in layers.items() if is_trained else ():
        scales = _scales_that_count(layer.ternary())
        error = (scales.half().float() / scales - 1).abs()
        if not bool((error <= _FP16_ROUNDING).all()):
            problems.append(
                f"{layer_name}: found scales from {float(scales.min()):.3g} to {float(scales.max()):.3g}, which "
                "float16 cannot hold to its precision; expected 6.2e-5 to 65504"
            )
    if problems:
        raise ExportError("a GGUF file of ternary blocks cannot hold this student: " + "; ".join(problems))


def _scales_that_count(ternary: TernaryWeight) -> Tensor:
    """Those of blocks with a trit that is not zero; zeros are zeros at any scale that float16 has."""
    scales_RG = ternary.scale_RG
    num_rows, num_groups = scales_RG.shape
    trits_RXGC = ternary.trits_OI.reshape(num_rows, -1, num_groups, ternary.trits_OI.shape[1] // num_groups)
    return scales_RG[trits_RXGC.any(dim=3).any(dim=1) | ~(scales_RG <= _FP16_LARGEST)]


def exported_tensors(model: Transformer) -> Iterator[tuple[str, Tensor, bool]]:
    """Our name of each tensor, its exact values as the file holds them, and whether they are ternary."""
    for layer_name, layer in model.quantized_linears().items():
        yield f"{layer_name}.weight", layer.ternary().with_scale_of(torch.float16).dequantized(), True
    plain = {f"{layer_name}.weight" for layer_name in plain_linears(model)} | {"model.embed_tokens.weight"}
    for tensor_name, parameter in model.named_parameters():
        values = parameter.detach().float()
        if tensor_name in plain:
            yield tensor_name, values.half().float() if fits_fp16(values) else values, False
        elif parameter.ndim == 1 and not tensor_name.endswith(".log_step"):
            yield tensor_name, values, False


def fits_fp16(values: Tensor) -> bool:
    """Whether no value is too large for float16."""
    return float(values.abs().max()) <= _FP16_LARGEST


def _tensors(model: Transformer, kind: TernaryType) -> Iterator[tuple[str, np.ndarray, str]]:
    """Name, values and type of every tensor, as llama.cpp wants them."""
    for tensor_name, found, is_ternary in exported_tensors(model):
        heads = rotated_heads(tensor_name, model.config)
        values = found if heads is None else interleave(found, heads)
        float_type = "F16" if values.ndim == 2 and fits_fp16(values) else "F32"
        yield gguf_name(tensor_name), values.contiguous().numpy(), kind if is_ternary else float_type


def _add_shape(writer: Any, model: Transformer, context_length: int) -> None:
    config = model.config
    writer.add_context_length(context_length)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(model.vocab_size)


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(list(tokenizer.tokens))
    writer.add_token_types([int(kind) for kind in tokenizer.types])
    writer.add_token_merges(list(tokenizer.merges))
    for role, token_id in tokenizer.special.items():
        getattr(writer, f"add_{role}_token_id")(token_id)
    for role, is_added in tokenizer.adds.items():
        getattr(writer, f"add_add_{role}_token")(is_added)
    writer.add_add_space_prefix(value=False)
    if tokenizer.templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in tokenizer.templates.items()])
