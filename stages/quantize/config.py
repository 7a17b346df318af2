"""Which quantisers a student uses."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tristill.stages.quantize.learned import Learned, NbitLearned, Seq
from tristill.stages.quantize.nbit import Nbit, NbitDiffused
from tristill.stages.quantize.quantizer import Quantizer, ScalePer, group_columns
from tristill.stages.quantize.ternary import Absmean, Twn
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
QUANTIZERS: dict[str, type[Quantizer]] = {
    "absmean": Absmean,
    "twn": Twn,
    "learned": Learned,
    "seq": Seq,
    "nbit": Nbit,
    "nbit-diffused": NbitDiffused,
    "nbit-learned": NbitLearned,
}


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
    def _fits_the_quantizer(self) -> Self:
        quantizer = self.quantizer
        if quantizer is not None and quantizer.takes_bits and self.bits is None:
            raise ValueError(f"weights = {self.weights!r} needs bits, and found none; set bits to 2..8")
        if self.bits is not None and not (quantizer and quantizer.takes_bits):
            raise ValueError(
                f"bits = {self.bits} belongs to the nbit codes, and found weights = {self.weights!r}; leave bits out, "
                "or set weights to nbit, nbit-diffused or nbit-learned (a variant cannot unset the bits of "
                "student.quantize: let the variants have them)"
            )
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

    @property
    def quantizer(self) -> Quantizer | None:
        """The code of the weights; None for full precision."""
        kind = QUANTIZERS.get(self.weights)
        return None if kind is None else kind(self.scale_per, self.bits)

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
        fields = {"weights", "bits", "scale_per", "layers"}
        return self.has_learned_step and self.model_dump(include=fields) == other.model_dump(include=fields)

    def covers(self, name: str) -> bool:
        """Whether the linear layer of that name is quantised."""
        return any(fnmatchcase(name, pattern) for pattern in self.layers)

    @property
    def is_ternary(self) -> bool:
        """Whether weights are -1, 0 or 1 times a scale."""
        return self.quantizer is not None and self.quantizer.is_ternary

    @property
    def has_learned_step(self) -> bool:
        """Whether the scale is a parameter that is trained."""
        return self.quantizer is not None and self.quantizer.learns_step

    @property
    def packed_bits(self) -> int | None:
        """Bits of a packed weight; None in full precision."""
        return 2 if self.is_ternary else self.bits
