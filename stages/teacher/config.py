"""Settings of the teacher."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from stages.models.config import ModelConfig
from stages.models.description import read_description
from stages.settings import Section, neutral
from stages.training.config import TrainingConfig


class TeacherConfig(Section):
    """The model that students learn from: trained here in full precision, or any checkpoint that is given."""

    path: Annotated[
        Path | None,
        neutral(
            "folder of a finished model, a teacher or a student, quantised or not, whose tokenizer is that of `data`; "
            "nothing is trained then. Its content is what counts, not where it is"
        ),
    ] = None
    model: Annotated[ModelConfig | None, Field(description="its shape, if it is trained here")] = None
    training: Annotated[TrainingConfig | None, Field(description="how it is trained here")] = None

    @field_validator("model")
    @classmethod
    def _is_a_llama(cls, model: ModelConfig | None) -> ModelConfig | None:
        if model is not None and model.subln:
            raise ValueError("a teacher with subln is no Llama that other programs load; set it on student.model only")
        return model

    @model_validator(mode="after")
    def _given_or_trained(self) -> Self:
        parts = {"model": self.model, "training": self.training}
        found = [name for name, part in parts.items() if part is not None]
        if len(found) != (2 if self.path is None else 0):
            everything = [*(["path"] if self.path is not None else []), *found]
            raise ValueError(
                "give either path (a teacher that is there already) or model and training (one to be trained); found "
                + (" and ".join(everything) or "none of them")
            )
        return self

    @property
    def shape(self) -> ModelConfig:
        """The shape of the teacher: configured, or as the given folder says. Raises CheckpointError if it cannot."""
        if self.path is None:
            assert self.model is not None, "checked above"
            return self.model
        return read_description(self.path).shape
