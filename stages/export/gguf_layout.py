"""How a student lies in a GGUF file of llama.cpp: architecture, names of tensors, order of rows.

Source: llama.cpp's own converter and loader (`convert_hf_to_gguf.py`, `src/llama-arch.cpp`); docs/export.md.
"""

import re

from torch import Tensor

from tristill.stages.models.description import ModelConfig

_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
_OURS = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_THEIR_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.weight")


def architecture(config: ModelConfig) -> str:
    """llama.cpp's architecture that computes this: `bitnet` has the norms of SubLN (and SiLU), `llama` has none."""
    return "bitnet" if config.subln else "llama"


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of our parameters."""
    found = _BLOCK.fullmatch(name)
    return f"blk.{found[1]}.{_IN_BLOCK[found[2]]}.weight" if found else _OUTSIDE[name]


def our_name(name: str) -> str | None:
    """Our name of one of llama.cpp's tensors; None for one that we never write."""
    found = _THEIR_BLOCK.fullmatch(name)
    if found:
        return f"model.layers.{found[1]}.{_OURS[found[2]]}.weight" if found[2] in _OURS else None
    return next((ours for ours, theirs in _OUTSIDE.items() if theirs == name), None)


def rotated_heads(name: str, config: ModelConfig) -> int | None:
    """Heads of a matrix whose rows llama.cpp wants in another order; None for all others.

    Its `llama` rotates neighbouring rows, Hugging Face's form the two halves of a head. Its `bitnet` rotates halves.
    """
    if config.subln:
        return None
    if name.endswith("self_attn.q_proj.weight"):
        return config.heads
    return config.num_kv_heads if name.endswith("self_attn.k_proj.weight") else None


def interleave(weight_OI: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves (a0 a1 .. b0 b1 ..) to pairs (a0 b0 a1 b1 ..)."""
    return weight_OI.view(heads, 2, -1, weight_OI.shape[1]).transpose(1, 2).flatten(0, 2)


def halves(weight_OI: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return weight_OI.view(heads, -1, 2, weight_OI.shape[1]).transpose(1, 2).flatten(0, 2)
