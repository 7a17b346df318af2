"""The shape of a model."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from tristill.stages.settings import Section


class ModelConfig(Section):
    """A Llama-compatible transformer: RMSNorm, RoPE, SwiGLU, grouped-query attention.

    The size of the vocabulary is the tokenizer's.
    """

    width: Annotated[int, Field(ge=8, description="D, width of the residual stream; multiples of 256 export to GGUF")]
    layers: Annotated[int, Field(ge=1, le=10_000, description="number of blocks")]
    heads: Annotated[int, Field(ge=1, description="attention heads; their size is width / heads, an even number")]
    kv_heads: Annotated[
        int | None, Field(ge=1, description="key and value heads, a divisor of heads; none gives one per head")
    ] = None
    mlp_width: Annotated[int, Field(ge=8, description="inner width of the SwiGLU MLP")]
    tied_embeddings: Annotated[bool, Field(description="the output head is the embedding matrix")] = True
    rope_theta: Annotated[float, Field(gt=0, description="base of the rotary position embedding")] = 10000.0
    norm_eps: Annotated[float, Field(gt=0, description="epsilon of every RMSNorm")] = 1e-5
    subln: Annotated[
        bool, Field(description="SubLN: an RMSNorm before the output projections of attention and MLP (BitNet)")
    ] = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads or self.head_width % 2:
            raise ValueError(f"width ({self.width}) must be an even multiple of heads ({self.heads})")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.num_kv_heads})")
        return self

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of one block, by their names in a Hugging Face Llama."""
        kv_width = self.num_kv_heads * self.head_width
        return {
            "self_attn.q_proj": (self.width, self.width),
            "self_attn.k_proj": (kv_width, self.width),
            "self_attn.v_proj": (kv_width, self.width),
            "self_attn.o_proj": (self.width, self.width),
            "mlp.gate_proj": (self.mlp_width, self.width),
            "mlp.up_proj": (self.mlp_width, self.width),
            "mlp.down_proj": (self.width, self.mlp_width),
        }

    def all_linear_shapes(self, vocab_size: int) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer by its full name, the output head last."""
        blocks = {
            f"model.layers.{layer}.{name}": shape
            for layer in range(self.layers)
            for name, shape in self.linear_shapes.items()
        }
        return {**blocks, "lm_head": (vocab_size, self.width)}

    def parameters(self, vocab_size: int) -> int:
        """All parameters."""
        norms = self.layers * (2 * self.width + (self.width + self.mlp_width) * self.subln) + self.width
        linear = self.layers * sum(rows * columns for rows, columns in self.linear_shapes.values())
        return linear + norms + vocab_size * self.width * (1 if self.tied_embeddings else 2)
