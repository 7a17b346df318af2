"""Which quantisers a student uses."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.settings import Section

WeightCode = Literal["absmean", "nbit", "nbit-diffused", "nbit-learned", "none"]


class QuantizeConfig(Section):
    """Quantisation of the linear layers of all blocks; embeddings, norms and the head stay in full precision."""

    weights: Annotated[
        WeightCode,
        Field(
            description="absmean: ternary, BitNet b1.58; nbit: symmetric levels, the largest weight of each row on the "
            "last; nbit-diffused: the same, each rounding error added to the next weight of its row; nbit-learned: "
            "symmetric levels, their distance learned per matrix (LSQ); none: an FP32 student"
        ),
    ] = "absmean"
    bits: Annotated[
        int | None,
        Field(
            ge=2, le=8, description="bits per weight of an nbit code, 2^bits - 1 levels; none: the code has no choice"
        ),
    ] = None
    activations: Annotated[
        Literal["absmax-int8", "none"], Field(description="absmax-int8: 8 bits per position, BitNet b1.58")
    ] = "absmax-int8"

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

    @property
    def is_ternary(self) -> bool:
        """Whether weights are ternary by their absolute mean, BitNet b1.58.

        Codes of 2 bits have three levels too, and are not meant: their scale is another.
        """
        return self.weights == "absmean"

    @property
    def is_nbit(self) -> bool:
        """Whether weights have 2^bits - 1 symmetric levels."""
        return self.weights.startswith("nbit")

    @property
    def packed_bits(self) -> int | None:
        """Bits of a packed weight; None in full precision."""
        return 2 if self.is_ternary else self.bits

    @property
    def has_scale_per_row(self) -> bool:
        """Whether each row of a matrix has a scale of its own, and not the matrix one."""
        return self.weights in {"nbit", "nbit-diffused"}
