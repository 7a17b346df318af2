"""Settings of the teacher."""

from typing import Annotated

from pydantic import Field, field_validator

from stages.models.config import ModelConfig
from stages.settings import Section
from stages.training.config import TrainingConfig


class TeacherConfig(Section):
    """The full-precision model that students learn from."""

    model: Annotated[ModelConfig, Field(description="its shape")]
    training: Annotated[TrainingConfig, Field(description="how it is trained")]

    @field_validator("model")
    @classmethod
    def _is_a_llama(cls, model: ModelConfig) -> ModelConfig:
        if model.subln:
            raise ValueError("a teacher with subln is no Llama that other programs load; set it on student.model only")
        return model
