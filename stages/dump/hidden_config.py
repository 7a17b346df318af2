"""Settings of how hidden states are kept."""

from typing import Annotated, Literal

from pydantic import Field

from tristill.cache.hidden import Float16Hidden, Float32Hidden, HiddenOutput, Int8Hidden
from tristill.stages.settings import Section


class TransformHiddenSettings(Section):
    """Transform coded to a relative error; steps, bases and tables come from the calibration."""

    kind: Annotated[Literal["transform"], Field(description="name of the coding")] = "transform"
    relative_error: Annotated[
        float,
        Field(gt=0, le=1, description="mean of |stored - true| / |true| over positions that are held out, per layer"),
    ] = 0.05
    delta: Annotated[
        bool,
        Field(
            description="predict each layer from the one before in cache.hidden_layers: smaller, but a student that "
            "reads a layer decodes those before it too"
        ),
    ] = True


class HiddenSettings(Section):
    """What of the layers of cache.hidden_layers is kept, and how."""

    output: Annotated[
        HiddenOutput,
        Field(
            description="of each block: the residual stream after it, what its attention or its MLP adds, or queries, "
            "keys and values, for distill.relations"
        ),
    ] = "residual"
    coding: Annotated[
        Float16Hidden | Float32Hidden | Int8Hidden | TransformHiddenSettings,
        Field(discriminator="kind", description="how the values of a position are stored"),
    ] = Float16Hidden()
    stride: Annotated[
        int,
        Field(
            ge=1, description="of every window, positions 0, stride, 2 stride, .. are kept, and the loss compares those"
        ),
    ] = 1
