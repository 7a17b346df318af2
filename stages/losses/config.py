"""Settings of the student's loss."""

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from tristill.cache.profiles.head_needs import MINING
from tristill.cache.profiles.profile import Need, TailTreatment
from tristill.stages.losses.hidden_config import HiddenLossConfig, RelationsConfig
from tristill.stages.losses.schedule import Schedule, Share, StepSchedule, Temperature, values_of
from tristill.stages.losses.selection_config import BalanceConfig, EntropyWeights, MiningConfig
from tristill.stages.losses.terms_config import (
    AnyTerm,
    AtTemperature,
    CrossEntropySettings,
    ForwardKLSettings,
    positive_temperature,
)
from tristill.stages.settings import Section

DEFAULT_ALPHA = 0.5


class LossConfig(Section):
    """A sum of terms on distributions, and losses on hidden states if configured (docs/methods.md).

    alpha and temperature are short for alpha * CE + (1 - alpha) * tau^2 * KL(p_tau || q_tau).
    """

    alpha: Annotated[
        Share | None,
        Field(
            description="share of cross-entropy on the labels, a number or a schedule; 1 trains without a teacher; "
            "none is 0.5, or what `losses` says"
        ),
    ] = None
    temperature: Annotated[
        Temperature | None,
        Field(description="tau of the KL term, a number or a schedule; none takes the temperature of the dump"),
    ] = None
    losses: Annotated[
        tuple[AnyTerm, ...] | None,
        Field(min_length=1, description="the terms, instead of alpha and temperature; none takes those"),
    ] = None
    tail: Annotated[
        TailTreatment | None,
        Field(description="what is taken for the tail outside a cached head; none for what the cache knows best"),
    ] = None
    hidden: Annotated[HiddenLossConfig | None, Field(description="loss on hidden states; none is off")] = None
    relations: Annotated[RelationsConfig | None, Field(description="loss on attention relations; none is off")] = None
    mining: Annotated[MiningConfig | None, Field(description="which positions of a batch count; none: all")] = None
    entropy_weights: Annotated[EntropyWeights | None, Field(description="how much each counts; none: alike")] = None
    balance: Annotated[BalanceConfig | None, Field(description="weights by gradient norms; none: as given")] = None

    _positive = field_validator("temperature")(positive_temperature)

    @model_validator(mode="after")
    def _terms_are_said_once(self) -> Self:
        if self.losses is None:
            return self
        if self.alpha is not None or self.temperature is not None:
            raise ValueError("give either losses, or alpha and temperature, which are short for two of them")
        if all(max(values_of(term.weight)) == 0 for term in self.losses):
            raise ValueError("losses: every weight is 0; give at least one term a weight")
        return self

    @model_validator(mode="after")
    def _weights_have_terms(self) -> Self:
        if self.entropy_weights is not None and not any(term.needs_teacher for term in self.terms):
            raise ValueError("entropy_weights: they count in terms that need the teacher's distribution, found none")
        return self

    @model_validator(mode="after")
    def _alpha_stays_a_share(self) -> Self:
        if self.alpha is not None and max(values_of(self.alpha)) > 1:
            raise ValueError("alpha must stay between 0 and 1")
        return self

    @property
    def label_share(self) -> float | Schedule:
        """alpha, of the shorthand."""
        return DEFAULT_ALPHA if self.alpha is None else self.alpha

    @property
    def terms(self) -> tuple[AnyTerm, ...]:
        """The terms on distributions, those of weight zero left out. Of the shorthand, weights are alpha's business."""
        if self.losses is not None:
            return tuple(term for term in self.losses if max(values_of(term.weight)) > 0)
        shares = values_of(self.label_share)
        terms: list[AnyTerm] = []
        if max(shares) > 0:
            terms.append(CrossEntropySettings(kind="cross_entropy"))
        if min(shares) < 1:
            terms.append(ForwardKLSettings(kind="forward_kl", temperature=self.temperature))
        return tuple(terms)

    @property
    def needs_targets(self) -> bool:
        """Whether anything looks at the teacher's distribution."""
        return any(term.needs_teacher for term in self.terms) or self.mines_by_divergence

    @property
    def mines_by_divergence(self) -> bool:
        """Whether hard examples are those far from the teacher."""
        return self.mining is not None and self.mining.by == "divergence"

    @property
    def needs_entropy(self) -> bool:
        """Whether the teacher's entropy is needed at every position."""
        return self.entropy_weights is not None and self.needs_targets

    def needs(self, dump_temperature: float) -> tuple[Need, ...]:
        """What is needed of the teacher's distribution; empty if nothing is."""
        return tuple(self._needs(dump_temperature))

    def _needs(self, dump_temperature: float) -> Iterator[Need]:
        for term in self.terms:
            if not term.needs_teacher:
                continue
            setting = term.temperature if isinstance(term, AtTemperature) else None
            setting = dump_temperature if setting is None else setting
            values = values_of(setting)
            if isinstance(setting, StepSchedule) or min(values) == max(values):
                yield from (Need(term.divergence, value, None, self.tail) for value in values)
            else:
                yield Need(term.divergence, values[0], values[1], self.tail)
        if self.mines_by_divergence:
            yield Need(MINING, dump_temperature, None, self.tail)
