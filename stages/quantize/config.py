"""Which quantisers a student uses."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tristill.stages.settings import Section


class WarmupConfig(Section):
    """Weights and activations move from full precision to their codes: x + lambda (Q(x) - x)."""

    steps: Annotated[int, Field(ge=1, description="first step at which quantisation is wholly on")]
    kind: Annotated[
        Literal["linear", "cosine", "step"],
        Field(description="lambda from 0 to 1 along a line, half a cosine, or all at once at the end"),
    ] = "linear"


def quantization_strength(config: WarmupConfig | None, step: int) -> float:
    """lambda of step `step`, counted from 0: 0 at the first, 1 from config.steps on and wherever there is no warm-up.

    With t = step / steps: linear t, cosine (1 - cos(pi t)) / 2, step 0. Straight-through gradients do not depend on
    lambda. After Mekkouri et al. 2024 (Fine-tuning LLMs to 1.58bit: extreme quantization made easy), who find it of use
    where a student starts from trained weights.
    """
    if config is None or step >= config.steps:
        return 1.0
    share = step / config.steps
    match config.kind:
        case "linear":
            return share
        case "cosine":
            return (1 - math.cos(math.pi * share)) / 2
        case "step":
            return 0.0


WeightCode = Literal["absmean", "twn", "learned", "seq", "nbit", "nbit-diffused", "nbit-learned", "none"]
ScalePer = Literal["tensor", "row", "group-128", "group-256"]

_TERNARY = ("absmean", "twn", "learned", "seq")


class QuantizeConfig(Section):
    """Quantisation of linear layers; embeddings and norms stay in full precision."""

    newer = ("scale_per", "layers", "warmup")

    weights: Annotated[
        WeightCode,
        Field(
            description="ternary: absmean (BitNet b1.58), twn (a threshold of 0.7 mean |W|), learned (LSQ), seq "
            "(stretched elastic, ParetoQ). nbit: symmetric levels, the largest weight of each row on the last; "
            "nbit-diffused: the same, each rounding error added to the next weight of its row; nbit-learned: symmetric "
            "levels, their distance learned per matrix (LSQ). none: an FP32 student"
        ),
    ] = "absmean"
    scale_per: Annotated[
        ScalePer,
        Field(description="what of a ternary matrix shares a scale; groups are of neighbouring columns of a row"),
    ] = "tensor"
    bits: Annotated[
        int | None,
        Field(
            ge=2, le=8, description="bits per weight of an nbit code, 2^bits - 1 levels; none: the code has no choice"
        ),
    ] = None
    layers: Annotated[
        tuple[str, ...],
        Field(
            min_length=1,
            description="which linear layers, by patterns of their names (`*` is any text, `[0-3]` one of these): "
            "model.layers.N.self_attn.{q,k,v,o}_proj, model.layers.N.mlp.{gate,up,down}_proj, and lm_head",
        ),
    ] = ("model.layers.*",)
    activations: Annotated[
        Literal["absmax-int8", "none"], Field(description="absmax-int8: 8 bits per position, BitNet b1.58")
    ] = "absmax-int8"

    warmup: Annotated[
        WarmupConfig | None,
        Field(description="how quantisation is turned on over the first steps; none has it on from the start"),
    ] = None

    @model_validator(mode="after")
    def _bits_belong_to_nbit(self) -> Self:
        if self.is_nbit and self.bits is None:
            raise ValueError(f"weights = {self.weights!r} needs bits, and found none; set bits to 2..8")
        if not self.is_nbit and self.bits is not None:
            raise ValueError(
                f"bits = {self.bits} belongs to the nbit codes, and found weights = {self.weights!r}; leave bits out, "
                "or set weights to nbit, nbit-diffused or nbit-learned (a variant cannot unset the bits of "
                "student.quantize: let the variants have them)"
            )
        return self

    @model_validator(mode="after")
    def _scales_are_of_ternary_codes(self) -> Self:
        if self.scale_per != "tensor" and not self.is_ternary:
            raise ValueError(
                f"scale_per = {self.scale_per!r} belongs to the ternary codes, and found weights = {self.weights!r}; "
                "leave it out"
            )
        if self.scale_per.startswith("group") and self.has_learned_step:
            raise ValueError(
                f"scale_per = {self.scale_per!r}: the step of weights = {self.weights!r} is learned per tensor or per "
                "row; set one of these, or weights to absmean or twn"
            )
        return self

    def misfits(self, linears: Mapping[str, tuple[int, int]]) -> list[str]:
        """What is wrong with these settings for a model of such linear layers, (out, in) by name; empty if nothing."""
        found = [
            f"layers: found {pattern!r}, which names no linear layer; there are, for example, "
            f"{', '.join([*list(linears)[:7], 'lm_head'])}"
            for pattern in self.layers
            if not any(fnmatchcase(name, pattern) for name in linears)
        ]
        group = group_columns(self.scale_per)
        odd = {columns: name for name, (_, columns) in linears.items() if self.covers(name) and columns % group}
        for columns, name in odd.items():
            serve = sorted({max(group, columns // group * group), -(-columns // group) * group})
            found.append(
                f"scale_per = {self.scale_per!r}: found rows of {columns} weights in {name}, expected a multiple of "
                f"{group}; the next that serve: {' and '.join(map(str, serve))}"
            )
        return found

    def has_steps_of(self, other: "QuantizeConfig") -> bool:
        """Whether learned steps of the one mean the same in the other."""
        mine, theirs = ((code.weights, code.bits, code.scale_per, code.layers) for code in (self, other))
        return self.has_learned_step and mine == theirs

    def covers(self, name: str) -> bool:
        """Whether the linear layer of that name is quantised."""
        return any(fnmatchcase(name, pattern) for pattern in self.layers)

    @property
    def is_ternary(self) -> bool:
        """Whether weights are -1, 0 or 1 times a scale."""
        return self.weights in _TERNARY

    @property
    def is_nbit(self) -> bool:
        """Whether weights have 2^bits - 1 symmetric levels."""
        return self.weights.startswith("nbit")

    @property
    def has_learned_step(self) -> bool:
        """Whether the scale is a parameter that is trained."""
        return self.weights in {"learned", "seq", "nbit-learned"}

    @property
    def packed_bits(self) -> int | None:
        """Bits of a packed weight; None in full precision."""
        return 2 if self.is_ternary else self.bits

    def num_scales(self, rows: int, columns: int) -> int:
        """Scales of a matrix; none in full precision."""
        if self.packed_bits is None:
            return 0
        if self.weights in {"nbit", "nbit-diffused"} or self.scale_per == "row":
            return rows
        return 1 if self.scale_per == "tensor" else rows * columns // group_columns(self.scale_per)


def group_columns(scale_per: ScalePer) -> int:
    """Columns of a group; 1 where rows are not cut."""
    return int(scale_per.removeprefix("group-")) if scale_per.startswith("group-") else 1
