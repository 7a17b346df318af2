"""Which quantisers a student uses."""

from typing import Annotated, Literal

from pydantic import Field

from stages.settings import Section


class QuantizeConfig(Section):
    """Quantisation of the linear layers of all blocks; embeddings, norms and the head stay in full precision."""

    weights: Annotated[
        Literal["absmean", "none"], Field(description="absmean: ternary, BitNet b1.58; none: an FP32 student")
    ] = "absmean"
    activations: Annotated[
        Literal["absmax-int8", "none"], Field(description="absmax-int8: 8 bits per position, BitNet b1.58")
    ] = "absmax-int8"

    @property
    def is_ternary(self) -> bool:
        """Whether the student's linear weights are ternary."""
        return self.weights == "absmean"
