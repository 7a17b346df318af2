"""Settings of the student and its distillation."""

from typing import Annotated, Literal

from pydantic import Field

from stages.losses.config import LossConfig
from stages.models.config import ModelConfig
from stages.quantize.config import QuantizeConfig
from stages.settings import Section, neutral
from stages.training.config import TrainingConfig


class StudentConfig(Section):
    """The model that is distilled."""

    model: Annotated[ModelConfig | None, Field(description="its shape; none takes the teacher's")] = None
    quantize: Annotated[QuantizeConfig, Field(description="how its linear layers are quantised")] = QuantizeConfig()
    init: Annotated[
        Literal["random", "teacher"],
        Field(description="first weights; teacher needs the teacher's folder and its shape"),
    ] = "random"


class DistillConfig(LossConfig):
    """The student's loss, where its targets come from, and its training."""

    targets: Annotated[
        Literal["cached", "online", "auto"],
        neutral(
            "cached: from the cache or not at all; online: forward the teacher; auto: cached if it serves, else online"
        ),
    ] = "auto"
    training: Annotated[TrainingConfig, Field(description="how the student is trained")]
