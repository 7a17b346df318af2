"""How strongly quantisation is on: a pure function of the step."""

import math
from typing import Annotated, Literal

from pydantic import Field

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
