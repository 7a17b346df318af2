"""Settings of the evaluation on the validation split."""

from typing import Annotated

from pydantic import Field

from tristill.stages.settings import Section, neutral


class EvaluateConfig(Section):
    """How held-out metrics are computed."""

    batch_windows: Annotated[int, neutral("windows per forward pass", ge=1)] = 16
    calibration_bins: Annotated[
        int, Field(ge=1, le=1000, description="bins of equal width of the expected calibration error")
    ] = 15
