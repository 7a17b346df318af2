"""Settings of the teacher."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from tristill.stages.models.description import ModelConfig, Shape, read_description
from tristill.stages.models.origin import Dtype, find_model
from tristill.stages.settings import ALWAYS_OUTSIDE, OUTSIDE, Section, neutral
from tristill.stages.training.config import TrainingConfig


class TeacherConfig(Section):
    """The model that students learn from: trained here in full precision, or any checkpoint that is given."""

    newer = ("dtype", "attention")

    path: Annotated[
        Path | None,
        OUTSIDE,
        neutral(
            "a finished model whose tokenizer is that of `data`, in place of model and training. A folder of ours, a "
            "teacher or a student, quantised or not; or any causal language model of transformers in safetensors "
            "(extra `hf`), by its folder or its name on the hub. Its content is what counts, not where it is"
        ),
    ] = None
    revision: Annotated[str | None, neutral("of a model on the hub: branch, tag or commit; none is main")] = None
    dtype: Annotated[Dtype, Field(description="of a model of transformers, as it is forwarded")] = "float32"
    attention: Annotated[
        str | None,
        Field(
            description="attention of a model of transformers: eager, sdpa, flash_attention_2 ..; none leaves it the "
            "choice. All give the same to rounding"
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        ALWAYS_OUTSIDE,
        neutral("run the Python code that comes with a model of transformers: only what you have read or trust wholly"),
    ] = False
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

    @model_validator(mode="after")
    def _loading_is_of_given_ones(self) -> Self:
        given = [*(["revision"] if self.revision else []), *self.of_transformers]
        if self.path is None and given:
            raise ValueError(f"{', '.join(given)}: how a given model is loaded, and no path gives one; leave it out")
        return self

    @property
    def named(self) -> str:
        """A given model, as it is called here."""
        return f"{self.path}@{self.revision}" if self.revision else str(self.path)

    @property
    def of_transformers(self) -> list[str]:
        """The settings given that are for models of transformers."""
        names = ("dtype", "attention", "trust_remote_code")
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @property
    def shape(self) -> Shape:
        """The shape of the teacher: configured, or as the given folder says. Raises CheckpointError if it cannot."""
        if self.path is None:
            assert self.model is not None, "checked above"
            return self.model
        return read_description(find_model(self.path, self.revision, download=False) or self.path).shape
