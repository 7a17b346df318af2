"""A Llama-compatible transformer with the parameter names of Hugging Face's `LlamaForCausalLM`.

Touvron et al. 2023, LLaMA (arXiv 2302.13971): pre-norm with RMSNorm, rotary embeddings, SwiGLU; grouped-query attention
as in Ainslie et al. 2023 (arXiv 2305.13245). Teacher and student are this one class; a student's linear layers are
quantised.

Shapes: B batch, T positions, D width, H heads, G key/value heads, E width of a head, V vocabulary.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tristill.cache.hidden import HiddenOutput
from tristill.stages.errors import StageError
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.language_model import Features, LanguageModel, State, StateWidths
from tristill.stages.models.quantized_linear import QuantizedLinear, project, quantize_linears
from tristill.stages.quantize.config import QuantizeConfig


class LayerPast:
    """What the attention of one block keeps. Keys are kept as rotated, so positions never move."""

    def __init__(self, capacity: int) -> None:
        self.length = 0
        self._capacity = capacity
        self._keys_BGCE: Tensor | None = None
        self._values_BGCE: Tensor | None = None

    def extend(self, keys_BGTE: Tensor, values_BGTE: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add T positions; all keys and values so far, and which of them each new position sees.

        The last is (T, length) booleans, or None where every new position sees all, which is so for T = 1.
        """
        new = keys_BGTE.shape[2]
        start, self.length = self.length, self.length + new
        assert self.length <= self._capacity, "the caller knows how long it gets"
        if self._keys_BGCE is None or self._values_BGCE is None:
            batch, heads, _, width = keys_BGTE.shape
            self._keys_BGCE = keys_BGTE.new_empty(batch, heads, self._capacity, width)
            self._values_BGCE = values_BGTE.new_empty(batch, heads, self._capacity, width)
        self._keys_BGCE[:, :, start : self.length] = keys_BGTE
        self._values_BGCE[:, :, start : self.length] = values_BGTE
        seen = torch.ones(new, self.length, dtype=torch.bool, device=keys_BGTE.device).tril(start) if new > 1 else None
        return self._keys_BGCE[:, :, : self.length], self._values_BGCE[:, :, : self.length], seen

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""
        if self._keys_BGCE is not None and self._values_BGCE is not None:
            self._keys_BGCE, self._values_BGCE = self._keys_BGCE[rows], self._values_BGCE[rows]


class SubNorm(nn.RMSNorm):
    """x + strength * (RMSNorm(x) - x), computed in float32: the norm itself, unless quantisation is being turned on.

    Wang et al. 2022, Foundation Transformers (arXiv 2210.06423), section 2, as BitNet has it (arXiv 2310.11453). With
    `strength` 0 it is not there: a student that starts from a teacher without it computes the teacher's logits.
    """

    strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape and dtype of x."""
        normed = F.rms_norm(x.float(), self.normalized_shape, self.weight, self.eps).to(x.dtype)
        return normed if self.strength == 1 else torch.lerp(x, normed, self.strength)


@torch.no_grad()
def fit_to_inputs(model: nn.Module, forward: Callable[[], object]) -> None:
    """Set the weights of every SubNorm so that it changes what reaches it in `forward` as little as it can.

    With u = x / rms(x), sum over positions of (x - w u)^2 is least at w = sum x u / sum u^2, for each of the D weights;
    one where a weight has no input. A norm that was put into a trained model so begins near the identity.
    """
    fitted: dict[SubNorm, Tensor] = {}

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, SubNorm), "hooks are on these alone"
        x_ND = inputs[0].flatten(0, -2).float()
        u_ND = F.rms_norm(x_ND, norm.normalized_shape, None, norm.eps)
        fitted[norm] = (x_ND * u_ND).sum(dim=0) / u_ND.square().sum(dim=0)

    handles = [norm.register_forward_pre_hook(look) for norm in model.modules() if isinstance(norm, SubNorm)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    for norm, weight_D in fitted.items():
        norm.weight.copy_(weight_D.nan_to_num(nan=1.0))


_INITIAL_STD = 0.02


class Transformer(LanguageModel):
    """Token ids to features."""

    def __init__(self, config: ModelConfig, vocab_size: int, quantize: QuantizeConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.quantize = quantize
        self.model = Decoder(config, vocab_size)
        self.lm_head = nn.Linear(config.width, vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if quantize is not None:
            quantize_linears(self, quantize)
        self._is_compiled = False

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.config.layers

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Its blocks, in order."""
        return list(self.model.layers)

    @property
    def widths(self) -> StateWidths:
        """Of its hidden states."""
        return StateWidths(self.config.width, self.config.width, self.config.num_kv_heads * self.config.head_width)

    @property
    def embedding_weight(self) -> Tensor:
        """The embedding, (V, D)."""
        return self.model.embed_tokens.weight

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, (V, D), quantised if it is to be."""
        return self.lm_head.quantized_weight() if isinstance(self.lm_head, QuantizedLinear) else self.lm_head.weight

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """Those of `lm_head`."""
        return self.lm_head.parameters()

    def forward(
        self, input_ids_BT: Tensor, states: Collection[State] = (), past: Sequence[LayerPast] | None = None
    ) -> Features:
        """Features of every position. With `past`, one per block, they follow the positions there and are added."""
        with self._ready_for_graphs() if self._is_compiled else nullcontext():
            features: Features = self.model(input_ids_BT, states, past)
        if isinstance(self.lm_head, QuantizedLinear):
            return replace(features, final_BTD=self.lm_head.quantized_input(features.final_BTD))
        return features

    def quantized_linears(self) -> dict[str, QuantizedLinear]:
        """The quantised layers by name, in order."""
        return {name: module for name, module in self.named_modules() if isinstance(module, QuantizedLinear)}

    def initialize(self, generator: torch.Generator) -> None:
        """Normal with deviation 0.02; the projections into the residual stream by 1 / sqrt(2 layers) less (GPT-2).

        Norms start at one, learned quantisation steps as the weights ask. The steps take nothing from the generator:
        students of one seed have the same weights, whatever their code.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(".log_step"):
                continue
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
                continue
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = _INITIAL_STD / (2 * self.config.layers) ** 0.5 if into_residual else _INITIAL_STD
            nn.init.normal_(parameter, std=std, generator=generator)
        self.fit_steps()

    def compile_blocks(self) -> None:
        """Compile all but the head, in place; names of parameters stay the same, results differ in the last bits."""
        self._is_compiled = True
        self.model.compile()

    @contextmanager
    def _ready_for_graphs(self) -> Iterator[None]:
        """Quantised weights are fresh, which a graph cannot see to; and none is compiled for each step of a warm-up."""
        layers = self.quantized_linears().values()
        for layer in layers:
            layer.refresh()
        is_on = all(layer.strength == 1 for layer in layers)
        with nullcontext() if is_on else torch.compiler.set_stance("force_eager"):
            yield

    def quantize_by(self, strength: float) -> None:
        """As of every model; SubLN is turned on with quantisation."""
        super().quantize_by(strength)
        for module in self.modules():
            if isinstance(module, SubNorm):
                module.strength = strength


class Decoder(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)

    def forward(
        self, input_ids_BT: Tensor, states: Collection[State], past: Sequence[LayerPast] | None = None
    ) -> Features:
        """Features of every position."""
        x_BTD = self.embed_tokens(input_ids_BT)
        first = past[0].length if past else 0
        rotation = rotary_angles(
            input_ids_BT.shape[1], self.config.head_width, self.config.rope_theta, x_BTD.device, first=first
        )
        hidden = {State("residual", 0): x_BTD} if State("residual", 0) in states else {}
        for number, block in enumerate(self.layers, start=1):
            wanted = {state.output for state in states if state.layer == number}
            x_BTD, outputs = block(x_BTD, rotation, wanted, past[number - 1] if past else None)
            hidden |= {State(output, number): value for output, value in outputs.items()}
        return Features(self.norm(x_BTD), hidden)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        wanted: Collection[HiddenOutput] = (),
        past: LayerPast | None = None,
    ) -> tuple[Tensor, dict[HiddenOutput, Tensor]]:
        """The residual stream after this block, and the outputs that are wanted."""
        attention_BTD, projections = self.self_attn(self.input_layernorm(x_BTD), rotation, past)
        x_BTD = x_BTD + attention_BTD
        mlp_BTD = self.mlp(self.post_attention_layernorm(x_BTD))
        x_BTD = x_BTD + mlp_BTD
        found: dict[HiddenOutput, Tensor] = {"residual": x_BTD, "attention": attention_BTD, "mlp": mlp_BTD}
        if "qkv" in wanted:
            found["qkv"] = torch.cat(projections, dim=-1)
        return x_BTD, {output: found[output] for output in wanted}


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        kv_width = config.num_kv_heads * config.head_width
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, kv_width, bias=False)
        self.v_proj = nn.Linear(config.width, kv_width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)
        self.attn_sub_norm = SubNorm(config.width, eps=config.norm_eps) if config.subln else nn.Identity()

    def forward(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], past: LayerPast | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """What attention adds to the residual stream; and queries, keys and values before rotation, (B, T, ..)."""
        batch, positions, _ = x_BTD.shape
        projections = project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_BHTE, k_BGTE, v_BGTE = (self._split_heads(projected) for projected in projections)
        k_BGTE = rotate(k_BGTE, rotation)
        seen = None
        if past is not None:
            k_BGTE, v_BGTE, seen = past.extend(k_BGTE, v_BGTE)
        mixed_BHTE = F.scaled_dot_product_attention(
            rotate(q_BHTE, rotation),
            k_BGTE,
            v_BGTE,
            attn_mask=seen,
            is_causal=past is None,
            enable_gqa=self.config.num_kv_heads != self.config.heads,
        )
        mixed_BTD = mixed_BHTE.transpose(1, 2).reshape(batch, positions, -1)
        return self.o_proj(self.attn_sub_norm(mixed_BTD)), projections

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.config.head_width).transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); Shazeer 2020, GLU Variants Improve Transformer (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)
        self.ffn_sub_norm = SubNorm(config.mlp_width, eps=config.norm_eps) if config.subln else nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """What the MLP adds to the residual stream."""
        gate, up = project(x_BTD, self.gate_proj, self.up_proj)
        out_BTD: Tensor = self.down_proj(self.ffn_sub_norm(F.silu(gate) * up))
        return out_BTD


def rotary_angles(
    positions: int, head_width: int, theta: float, device: torch.device, first: int = 0
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the rotary angles from position `first`, each (T, E) float32 in Hugging Face's half-split layout.

    Su et al. 2021, RoFormer (arXiv 2104.09864), equation 15: angle(t, i) = t * theta^(-2i / E).
    """
    frequencies = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width)
    steps_T = torch.arange(first, first + positions, dtype=torch.float32, device=device)
    angles_TE = torch.outer(steps_T, frequencies).repeat(1, 2)
    return angles_TE.cos(), angles_TE.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x (..., T, E) turned by its position's angles, in x's dtype."""
    cos_TE, sin_TE = rotation
    first, second = x.chunk(2, dim=-1)
    turned = x * cos_TE + torch.cat((-second, first), dim=-1) * sin_TE
    return turned.to(x.dtype)


def compile_model(model: LanguageModel) -> None:
    """Compile a model in place: see Transformer.compile_blocks. The first step takes a minute or more.

    Raises StageError where there is no C++ compiler, which torch needs on a CPU, and for other architectures.
    """
    if not isinstance(model, Transformer):
        raise StageError("training.compile: is for our own transformer, a Llama; set it to false")
    compiler = os.environ.get("CXX", "g++")
    if model.head_weight.device.type == "cpu" and shutil.which(compiler) is None:
        raise StageError(
            f"training.compile: found no C++ compiler ({compiler}), which torch.compile needs on a CPU; install one, "
            "name it in CXX, or set training.compile to false"
        )
    model.compile_blocks()
