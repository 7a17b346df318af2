"""What is measured of models as they are deployed."""

import statistics
from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict


class Spread(BaseModel):
    """A quantity over the rounds."""

    model_config = ConfigDict(frozen=True)

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The spread of these, at least one."""
        return cls(median=statistics.median(values), min=min(values), max=max(values))


class Speed(BaseModel):
    """Tokens per second, and its ratio to the teacher's of the same round; None where the teacher was not run."""

    model_config = ConfigDict(frozen=True)

    tokens_per_s: Spread
    to_teacher: Spread | None


class Form(BaseModel):
    """One model in one form."""

    model_config = ConfigDict(frozen=True)

    model: str
    form: str
    runtime: str | None
    """What it was run by; None if it was not run."""
    disk_bytes: int | None
    of_fp32: float | None
    """disk_bytes over those of the same model's model.safetensors, in FP32."""
    of_fp16: float | None
    """disk_bytes over those of the same tensors in fp16."""
    prompt: Speed | None = None
    """Of processing a prompt."""
    generation: Speed | None = None
    """Of going on from it, a token at a time."""
    why_not: str | None = None
    """Why it is not there, or was not run, though it should be."""


class Deployment(BaseModel):
    """All forms, and how they were timed."""

    model_config = ConfigDict(frozen=True)

    threads: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    torch: str
    xllamacpp: str | None
    forms: tuple[Form, ...]
