"""Weights and temperatures that change during training, as pure functions of the step; one kind listens to the loss."""

import math
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from tristill.stages.settings import Section

_Positive = Annotated[float, Field(gt=0, le=1000)]
_Milestone = Annotated[float, Field(ge=0, le=1)]


class _Ramp(Section):
    """From start to end, then constant."""

    start: Annotated[float, Field(ge=0, le=1000, description="value at the first step")]
    end: Annotated[float, Field(ge=0, le=1000, description="value from `until` on")]
    until: Annotated[float, Field(gt=0, le=1, description="share of the steps at which the end is reached")] = 1.0

    @property
    def values(self) -> tuple[float, ...]:
        """Those it lies between."""
        return (self.start, self.end)


class LinearSchedule(_Ramp):
    """From start to end in a straight line, then constant."""

    kind: Annotated[Literal["linear"], Field(description="name of the schedule")]

    def at(self, progress: float) -> float:
        """The value when this share of the steps is done."""
        return self.start + (self.end - self.start) * min(1.0, progress / self.until)


class CosineSchedule(_Ramp):
    """From start to end along half a cosine, flat at both ends, then constant."""

    kind: Annotated[Literal["cosine"], Field(description="name of the schedule")]

    def at(self, progress: float) -> float:
        """The value when this share of the steps is done."""
        done = min(1.0, progress / self.until)
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * done))


class StepSchedule(Section):
    """Constant between milestones."""

    kind: Annotated[Literal["step"], Field(description="name of the schedule")]
    values: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1000)], ...],
        Field(min_length=2, description="the first value, then that from each milestone on"),
    ]
    milestones: Annotated[tuple[_Milestone, ...], Field(min_length=1, description="shares of the steps, ascending")]

    @model_validator(mode="after")
    def _one_value_more_than_milestones(self) -> Self:
        if len(self.values) != len(self.milestones) + 1 or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(
                f"expected ascending milestones and one value more than those, found {len(self.values)} values and "
                f"milestones {list(self.milestones)}"
            )
        return self

    def at(self, progress: float) -> float:
        """The value when this share of the steps is done."""
        return self.values[sum(progress >= milestone for milestone in self.milestones)]


class AdaptiveTemperature(Section):
    """Lowered by a factor whenever the term has stayed under a bound for so many steps."""

    kind: Annotated[Literal["adaptive"], Field(description="name of the schedule")]
    start: Annotated[_Positive, Field(description="first temperature")]
    lowest: Annotated[_Positive, Field(description="it never goes below")] = 1.0
    factor: Annotated[float, Field(gt=0, lt=1, description="what it is multiplied by")] = 0.8
    bound_nats: Annotated[float, Field(gt=0, description="the term's value, before tau^2 and weight, is to stay under")]
    patience: Annotated[int, Field(ge=1, description="steps in a row")] = 10

    @model_validator(mode="after")
    def _goes_down(self) -> Self:
        if self.lowest > self.start:
            raise ValueError(f"lowest ({self.lowest:g}) must not exceed start ({self.start:g})")
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """Those it lies between."""
        return (self.start, self.lowest)

    def after(self, temperature: float, calm_steps: int, value_nats: float) -> tuple[float, int]:
        """(temperature, calm steps) after a step in which the term had this value."""
        calm_steps = calm_steps + 1 if value_nats < self.bound_nats else 0
        if calm_steps < self.patience:
            return temperature, calm_steps
        return max(self.lowest, temperature * self.factor), 0


Schedule = LinearSchedule | CosineSchedule | StepSchedule
NUMBER = "number"
"""Tag of a plain number where a schedule may stand too."""


def _kind(setting: object) -> str | None:
    kind = setting.get("kind") if isinstance(setting, dict) else getattr(setting, "kind", NUMBER)
    return None if kind is None else str(kind)


_KINDS = Discriminator(
    _kind,
    custom_error_type="schedule",
    custom_error_message="expected a number, or a table whose kind is that of a schedule",
)
_Scheduled = (
    Annotated[LinearSchedule, Tag("linear")]
    | Annotated[CosineSchedule, Tag("cosine")]
    | Annotated[StepSchedule, Tag("step")]
)
Share = Annotated[Annotated[float, Field(ge=0, le=1), Tag(NUMBER)] | _Scheduled, _KINDS]
"""A number between 0 and 1, or a schedule."""
Weight = Annotated[Annotated[float, Field(ge=0, le=1e6), Tag(NUMBER)] | _Scheduled, _KINDS]
"""A number from 0, or a schedule."""
Temperature = Annotated[
    Annotated[float, Field(gt=0, le=1000), Tag(NUMBER)] | _Scheduled | Annotated[AdaptiveTemperature, Tag("adaptive")],
    _KINDS,
]
"""A number above 0, or a schedule."""


def value_at(setting: float | Schedule, step: int, steps: int) -> float:
    """The value of a setting at step `step` of `steps`, counted from 0; the last step is the end."""
    return setting if isinstance(setting, float | int) else setting.at(step / max(1, steps - 1))


def values_of(setting: float | Schedule | AdaptiveTemperature) -> tuple[float, ...]:
    """The values that a setting goes through, or lies between."""
    return (setting,) if isinstance(setting, float | int) else setting.values
