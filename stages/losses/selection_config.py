"""Settings of which positions and windows count, and how much."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tristill.stages.settings import Section


class MiningConfig(Section):
    """Online hard example mining: of every batch only the hardest positions count in the terms on distributions."""

    fraction: Annotated[float, Field(gt=0, lt=1, description="share of the positions of a batch that are kept")]
    by: Annotated[
        Literal["loss", "entropy", "divergence"],
        Field(
            description="what is hard: a high cross-entropy of the student, a high entropy of it, or a high forward KL "
            "from the teacher"
        ),
    ] = "loss"


class EntropyWeights(Section):
    """Weights (1 + H)^power of positions in the terms that need the teacher, H its entropy in nats, their mean one."""

    power: Annotated[
        float, Field(ge=-8, le=8, description="above 0 favours positions where the teacher is unsure; below 0, sure")
    ]


class CurriculumConfig(Section):
    """Windows from easy to hard: at every step, only the easiest share of all windows is seen, and it grows to all."""

    by: Annotated[
        Literal["entropy", "confidence"],
        Field(
            description="what is easy, as a mean over a window: a low entropy of the teacher, or a high probability "
            "that it gives to the label"
        ),
    ] = "entropy"
    start: Annotated[float, Field(gt=0, le=1, description="share of the windows that is seen at first")] = 0.2
    until: Annotated[float, Field(gt=0, le=1, description="share of the steps at which all windows are seen")] = 0.5
    pacing: Annotated[
        Literal["linear", "root", "step"],
        Field(description="how the share grows: linearly, as a square root, or in five equal steps"),
    ] = "root"


class BalanceConfig(Section):
    """Weights of terms scaled such that their gradients' norms are as their weights are."""

    every: Annotated[int, Field(ge=1, description="steps between measurements of the norms")] = 20
    smoothing: Annotated[float, Field(ge=0, lt=1, description="share of the old factor at each measurement")] = 0.5


class OnlineConfig(Section):
    """A teacher that moves with the student, instead of the frozen one; forwarded at every step."""

    co_train: Annotated[
        bool, Field(description="train a teacher from scratch beside the student, on the same batches")
    ] = False
    ema: Annotated[
        float | None,
        Field(gt=0, lt=1, description="decay of a moving average of weights, which gives the targets; none is off"),
    ] = None
    ema_of: Annotated[
        Literal["teacher", "student"],
        Field(description="whose weights are averaged: the co-trained teacher's, or the student's own"),
    ] = "teacher"

    learning_rate: Annotated[
        float | None, Field(gt=0, description="peak of the co-trained teacher; none takes the student's")
    ] = None

    @model_validator(mode="after")
    def _average_of_something_that_moves(self) -> Self:
        if not self.co_train and self.ema is None:
            raise ValueError("give co_train or ema; leave the table out for the frozen teacher")
        if self.ema is not None and self.ema_of == "teacher" and not self.co_train:
            raise ValueError("a frozen teacher has no moving average; set co_train, or ema_of = 'student'")
        if self.ema_of == "student" and (self.co_train or self.ema is None):
            raise ValueError("ema_of = 'student' needs ema and excludes co_train: targets come from one model")
        return self
