"""What is kept of the teacher's hidden states (docs/format.md, section 6)."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cache.arrays import ArraySpec


class HiddenSpec(BaseModel):
    """Hidden states that are stored: outputs of the residual stream after each listed block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    width: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _layers_are_distinct(self) -> Self:
        if len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise ValueError(f"hidden layers must be distinct and not negative, found {list(self.layers)}")
        return self

    def arrays(self, layer: int, context_length: int) -> tuple[ArraySpec, ...]:
        """The arrays of one layer."""
        return (ArraySpec(f"hidden_{layer}", (context_length, self.width), "<f2"),)
