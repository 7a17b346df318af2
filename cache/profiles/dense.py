"""Profile `dense`: the teacher's last hidden state in 8 bits, and its output matrix once; docs/format.md, section 4."""

from typing import Annotated, Literal

from pydantic import Field

from tristill.cache.arrays import ArraySpec
from tristill.cache.profiles.head_needs import whole_distribution
from tristill.cache.profiles.profile import Need, Profile


class DenseProfile(Profile):
    """All that the output head needs: as good as forwarding the teacher, to the rounding of 8 bits per position."""

    kind: Annotated[Literal["dense"], Field(description="name of the profile")] = "dense"
    width: Annotated[int, Field(ge=1, description="D, width of the final hidden state")]
    temperature: Annotated[
        float,
        Field(gt=0, le=1000, description="tau_dump, which a student takes that names none; any serves"),
    ] = 1.0

    def arrays(self, vocab_size: int, context_length: int) -> tuple[ArraySpec, ...]:
        """`final` (T, D) = round(h / scale), `final_scale` (T,) = max |h| / 127."""
        del vocab_size
        return (
            ArraySpec("final", (context_length, self.width), "|i1"),
            ArraySpec("final_scale", (context_length,), "<f2"),
        )

    def tables(self, vocab_size: int) -> tuple[ArraySpec, ...]:
        """`output_matrix` (V, D)."""
        return (ArraySpec("output_matrix", (vocab_size, self.width), "<f4"),)

    def unserved(self, need: Need, vocab_size: int) -> str | None:
        """Everything is served, and there is no tail to treat."""
        del vocab_size
        return None if need.tail is None else whole_distribution(need.tail, "this dense cache")
