"""Every causal architecture that transformers has, shrunken to some ten thousand random weights.

What came of each as teacher and student is in docs/models.md: `ARCHITECTURES=write pytest -m slow -k every_architecture`
writes it there.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from tristill.stages.distill.config import DistillConfig, StudentConfig
from tristill.stages.distill.distill import distill
from tristill.stages.errors import StageError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.models.hugging_face_folder import hugging_face_shape, load_hugging_face
from tristill.stages.models.origin import Origin
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.targets.online import OnlineSource

VOCAB, LAYERS = 300, 4
_SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "block_dim", "conv_dim", "lru_width",
         "attention_hidden_size", "embedding_size", "projection_dim", "cross_attention_hidden_size", "emb_dim", "embedding_dim", "hidden_size_global", "adapter_in_dim", "adapter_out_dim",
         "adapter_input_size",
         "ffn_hidden_dim", "xlm_emb_dim", "encoder_hidden_size", "depth_hidden_size", "moe_latent_size"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers",
         "encoder_layers", "num_encoder_layers", "num_blocks", "depth_num_hidden_layers", "global_layers"), LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
         "num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads", "global_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "global_head_dim", "kv_channels", "swa_head_dim", "swa_v_head_dim", "attention_head_dim",
         "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "d_kv", "attn_head_dim", "d_head"), 8),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "ffn_hidden_size", "d_ff",
         "block_ff_dim", "intermediate_size_mlp", "dim_ff", "d_inner", "dff", "feed_forward_size", "mamba_d_ssm"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "ngram_vocab_size",
                     "encoder_hash_byte_group_vocab", "shape_vocab_size", "pronunciation_vocab_size"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), 256),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "num_experts_per_token"), 2),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
         "shared_intermediate_size", "expert_ffn_hidden_size", "ngram_hidden_size", "moe_ffn_hidden_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace",
                     "num_mem_blocks", "mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_n_heads", "mamba_num_heads",
                     "n_mamba_heads", "mamba_d_head", "mamba_head_dim", "mamba_headdim", "mamba_chunk_size",
                     "chunk_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_expand", "expand", "altup_num_inputs", "index_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim", "index_topk"), 8),
    **dict.fromkeys(("attention_window_size", "sliding_window", "local_attention", "window_size"), 16),
    **dict.fromkeys(("conv_kernel", "laurel_rank", "adapter_rank", "time_step_rank", "mamba_dt_rank", "rotary_dim"), 4),
    "qk_head_dim": 16, "linear_num_value_heads": 4, "num_kv_shared_layers": 0, "query_pre_attn_scalar": 8,
    "use_mamba_kernels": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


_QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4}  # fmt: skip
# fmt: off
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "layers_block_type": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bailing_hybrid": {"num_expert_group": 1, "n_group": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 8, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": {"layer_types": ["full_attention"] * 4}},
    "dots3_note_text": {"layer_types": ["full_attention"] * 4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "layers_block_type": ["mamba", "hybrid"] * 2,
               "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the names of sizes do not give."""
# fmt: on


def shrunken(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a small model of the same architecture: sizes that are known by name, lists of as many blocks."""
    depth = next((settings[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if settings.get(key)), None)
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "per_layer_config":
            continue
        if isinstance(value, dict):
            small[key] = shrunken(value)
        elif isinstance(value, list) and len(value) == depth and key in _SMALL:
            small[key] = [_SMALL[key]] * LAYERS
        elif isinstance(value, list) and len(value) == depth:
            small[key] = [value[kind] for kind in (sorted({value.index(item) for item in value}) * LAYERS)[:LAYERS]]
        elif key in _SMALL and (key in _TOKENS or isinstance(value, int)):
            small[key] = _SMALL[key]
        else:
            small[key] = value
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "is_decoder" in small:
        small["is_decoder"] = True
    return small


def settings_of(kind: str) -> dict[str, Any]:
    """Settings of the shrunken model of an architecture."""
    from transformers import AutoConfig

    small, special = shrunken(AutoConfig.for_model(kind).to_dict()), _SPECIAL.get(kind, {})
    return {key: {**small[key], **value} if isinstance(value, dict) else value for key, value in special.items()} | {
        key: value for key, value in small.items() if key not in special
    }


def causal_architectures() -> list[str]:
    """All that the installed transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def write_architecture(kind: str, folder: Path, tokenizer_json: Path) -> None:
    """A folder with the shrunken model; with nothing but its description where transformers makes none of it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    try:
        config = type(AutoConfig.for_model(kind)).from_dict(settings_of(kind))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().save_pretrained(folder)
    except Exception:  # noqa: BLE001 - it needs what is not installed, or is a part of another model
        (folder / "config.json").write_text(json.dumps({"model_type": kind, "num_hidden_layers": 1}))
        safetensors.torch.save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())


class Outcome(NamedTuple):
    """What came of an architecture as teacher, and as student of two steps: a refusal, or "" if it works."""

    teacher: str
    student: str
    share: float | None = None
    """Of its blocks' weights, ternary."""


def outcome(kind: str, folder: Path, data: Path) -> Outcome:
    """Takes the shrunken model as teacher, and as a student that starts from it. Anything but a refusal is raised."""
    write_architecture(kind, folder / "teacher", data / "tokenizer.json")
    try:
        teacher = load_hugging_face(Origin(folder=folder / "teacher"), data / "tokenizer.json")
    except StageError as exc:
        return Outcome(str(exc), str(exc))
    config = DistillConfig.model_validate(
        {"targets": "online", "training": {"steps": 2, "batch_windows": 2, "learning_rate": 1e-3}}
    )
    student = StudentConfig(init="teacher", quantize=QuantizeConfig(layers=("*.[0-9]*.*",)))
    source = OnlineSource(data, torch.device("cpu"), teacher=teacher)
    try:
        summary = distill(
            config, student, hugging_face_shape(folder / "teacher"), source, torch.device("cpu"), folder / "student",
            folder / "teacher", EvaluateConfig(), {},
        )  # fmt: skip
    except StageError as exc:
        return Outcome("", str(exc))
    finally:
        shutil.rmtree(folder)
    return Outcome("", "", summary.model.quantized_share)


_PAGE = Path(__file__).parents[1] / "docs" / "models.md"
_BEGIN, _END = "<!-- what came of every architecture: a test writes it -->\n", "<!-- end -->\n"
_WORKS, _HARDLY = "Teacher and student", "Teacher and student, less than nine tenths of its blocks' weights ternary"
_REASONS = {
    "final_logit_softcapping": "it caps its logits",
    "logits are no multiple": "its logits are no product of its last states and its output matrix",
    "has no output matrix": "it has no output matrix",
    "come later": "it looks ahead",
    "cannot load it|cannot make it": "transformers makes no causal language model of its description",
    "forward pass fails": "its forward pass fails in transformers",
    "expected the number of blocks": "its description does not say how many blocks it has",
    "names no linear layer": "none of its layers is quantised",
    "trains in no": "it does not train without dropout",
}
"""What refusals hold, and what the page says for it."""


def _reason(refusal: str) -> str:
    return next((said for pattern, said in _REASONS.items() if re.search(pattern, refusal)), refusal)


def outcome_lines(found: Mapping[str, Outcome]) -> dict[str, str]:
    """What the page says of each."""
    lines = {}
    for kind, (teacher, student, share) in found.items():
        if teacher:
            lines[kind] = f"Refused: {_reason(teacher)}"
        elif student:
            lines[kind] = f"Teacher only: {_reason(student)}"
        else:
            lines[kind] = _WORKS if share is None or share >= 0.9 else _HARDLY
    return lines


def documented() -> dict[str, str]:
    """The same, as the page has it."""
    _, rest = _PAGE.read_text(encoding="utf-8").split(_BEGIN)
    found = re.findall(r"^- \*\*(.*)\*\* \(\d+\): (.*)$", rest.split(_END)[0], re.MULTILINE)
    return {kind: line for line, kinds in found for kind in re.findall("`(.*?)`", kinds)}


def document(lines: Mapping[str, str]) -> None:
    """Write it there."""
    before, rest = _PAGE.read_text(encoding="utf-8").split(_BEGIN)
    text = "".join(
        f"- **{line}** ({len(kinds)}): {', '.join(f'`{kind}`' for kind in kinds)}\n"
        for line in sorted(set(lines.values()), key=lambda line: (not line.startswith(_WORKS), line))
        if (kinds := sorted(kind for kind in lines if lines[kind] == line))
    )
    _PAGE.write_text(before + _BEGIN + text + _END + rest.split(_END, 1)[1], encoding="utf-8")
