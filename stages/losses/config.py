"""Settings of the student's loss."""

from typing import Annotated

from pydantic import Field

from cache.profiles.profile import Need
from stages.settings import Section


class HiddenLossConfig(Section):
    """Mean squared error between hidden states of student and teacher, through learned projections."""

    weight: Annotated[
        float, Field(ge=0, description="weight of the term beside the loss on distributions; 0 is off")
    ] = 1.0
    layers: Annotated[
        dict[int, int],
        Field(
            min_length=1,
            description="student layer = teacher layer, as numbers of blocks from 1 (0 is the embedding); the cache "
            "must hold the teacher's (cache.hidden_layers)",
        ),
    ]


class LossConfig(Section):
    """alpha * CE + (1 - alpha) * tau^2 * KL(p_tau || q_tau), and hidden states if configured (docs/methods.md)."""

    alpha: Annotated[
        float, Field(ge=0, le=1, description="share of cross-entropy on the labels; 1 trains without a teacher")
    ] = 0.5
    temperature: Annotated[
        float | None, Field(gt=0, le=1000, description="tau of the KL term; none takes the temperature of the dump")
    ] = None
    hidden: Annotated[HiddenLossConfig | None, Field(description="loss on hidden states; none is off")] = None

    def need(self, dump_temperature: float) -> Need | None:
        """What is needed of the teacher's distribution; None if nothing is."""
        return None if self.alpha == 1 else Need("forward_kl", self.temperature or dump_temperature)

    @property
    def layer_map(self) -> dict[int, int]:
        """Student layer to teacher layer, for the hidden states that the loss compares."""
        return self.hidden.layers if self.hidden is not None and self.hidden.weight > 0 else {}

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """The teacher's hidden layers that the loss needs, ascending."""
        return tuple(sorted(set(self.layer_map.values())))
