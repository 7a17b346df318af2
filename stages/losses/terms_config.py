"""Settings of the loss terms on distributions, one class per kind; formulas and sources are in docs/methods.md."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from tristill.stages.losses.schedule import Temperature, Weight, values_of
from tristill.stages.settings import Section


def positive_temperature(temperature: Temperature | None) -> Temperature | None:
    """The setting; a ValueError if a schedule goes to zero."""
    if temperature is not None and min(values_of(temperature)) <= 0:
        raise ValueError("a temperature must stay above 0")
    return temperature


class TermSettings(Section):
    """Base of all terms. The total is the sum over terms of weight * tau^power * term."""

    needs_teacher: ClassVar[bool] = True
    temperature_power: ClassVar[int] = 0
    """Keeps the size of the gradient as tau grows: 2 where it falls as 1 / tau^2, 1 where as 1 / tau."""

    weight: Annotated[Weight, Field(description="weight in the total: a number or a schedule")] = 1.0

    @property
    def divergence(self) -> str:
        """What a cache is asked whether it serves."""
        return str(self.kind)  # type: ignore[attr-defined]


class CrossEntropySettings(TermSettings):
    """-log q(label)."""

    needs_teacher: ClassVar[bool] = False
    kind: Annotated[Literal["cross_entropy"], Field(description="name of the term")]


class AtTemperature(TermSettings):
    """Base of terms that compare p and q at a temperature."""

    temperature_power: ClassVar[int] = 2

    temperature: Annotated[
        Temperature | None,
        Field(description="tau: a number or a schedule; none takes the temperature of the dump"),
    ] = None

    _positive = field_validator("temperature")(positive_temperature)


class ForwardKLSettings(AtTemperature):
    """KL(p || q)."""

    kind: Annotated[Literal["forward_kl"], Field(description="name of the term")]


class ReverseKLSettings(AtTemperature):
    """KL(q || p)."""

    kind: Annotated[Literal["reverse_kl"], Field(description="name of the term")]


class JensenShannonSettings(AtTemperature):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""

    kind: Annotated[Literal["jensen_shannon"], Field(description="name of the term")]
    beta: Annotated[float, Field(gt=0, lt=1, description="share of the teacher in the mixture")] = 0.5


class SkewForwardKLSettings(AtTemperature):
    """KL(p || skew p + (1 - skew) q)."""

    kind: Annotated[Literal["skew_forward_kl"], Field(description="name of the term")]
    skew: Annotated[float, Field(gt=0, lt=1, description="share of the teacher in the mixture")] = 0.1


class SkewReverseKLSettings(AtTemperature):
    """KL(q || (1 - skew) p + skew q)."""

    kind: Annotated[Literal["skew_reverse_kl"], Field(description="name of the term")]
    skew: Annotated[float, Field(gt=0, lt=1, description="share of the student in the mixture")] = 0.1


class AdaptiveKLSettings(AtTemperature):
    """Forward and reverse KL, weighted by where teacher and student differ: in the head or in the tail."""

    kind: Annotated[Literal["adaptive_kl"], Field(description="name of the term")]
    head_mass: Annotated[float, Field(gt=0, lt=1, description="mass of the fewest ids that are the head")] = 0.5


class TotalVariationSettings(AtTemperature):
    """(1/2) sum |p - q|."""

    temperature_power: ClassVar[int] = 1
    kind: Annotated[Literal["total_variation"], Field(description="name of the term")]


class DecoupledKDSettings(AtTemperature):
    """alpha KL of target against the rest + beta KL among the rest."""

    kind: Annotated[Literal["decoupled_kd"], Field(description="name of the term")]
    alpha: Annotated[float, Field(ge=0, description="weight of the target against the rest")] = 1.0
    beta: Annotated[float, Field(ge=0, description="weight of the rest among itself")] = 1.0
    of: Annotated[
        Literal["label", "top1"], Field(description="the target: the label, or the teacher's most likely id")
    ] = "label"

    @property
    def divergence(self) -> str:
        """What a cache is asked whether it serves."""
        return "decoupled_kd of labels" if self.of == "label" else "decoupled_kd of top1"


class LogitMSESettings(TermSettings):
    """Mean squared error between centred logits."""

    kind: Annotated[Literal["logit_mse"], Field(description="name of the term")]


class RankingSettings(TermSettings):
    """Pairwise logistic loss over the teacher's largest entries."""

    kind: Annotated[Literal["ranking"], Field(description="name of the term")]
    entries: Annotated[int, Field(ge=2, le=64, description="largest entries that are compared in pairs")] = 8


class Top1HingeSettings(TermSettings):
    """max(0, margin - (z of the teacher's most likely id - largest other z))."""

    kind: Annotated[Literal["top1_hinge"], Field(description="name of the term")]
    margin: Annotated[float, Field(gt=0, description="wanted distance, in nats of logit")] = 1.0


AnyTerm = Annotated[
    CrossEntropySettings
    | ForwardKLSettings
    | ReverseKLSettings
    | JensenShannonSettings
    | SkewForwardKLSettings
    | SkewReverseKLSettings
    | AdaptiveKLSettings
    | TotalVariationSettings
    | DecoupledKDSettings
    | LogitMSESettings
    | RankingSettings
    | Top1HingeSettings,
    Field(discriminator="kind"),
]
