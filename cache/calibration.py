"""What was measured before a dump, and what was chosen: kept with the tables and repeated in the manifest."""

import re
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from tristill.cache.hashing import canonical_json

_TEMPERATURE = re.compile(r"[0-9]{1,4}(\.[0-9]{1,12})?")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FidelityPoint(_Strict):
    """How well one setting serves. Angles, norm ratios and divergences are by temperature, as text.

    angle_deg: between the mean gradients of forward KL in the output matrix of a student, from the stored and from the
    full distribution. norm_ratio: of the lengths of the two. kl_nats: mean KL(p || p stored), None if that is infinite.
    Temperatures that the profile does not serve are left out.
    """

    settings: dict[str, float | int | bool | str]
    bytes_per_position: Annotated[float, Field(ge=0)]
    angle_deg: dict[str, float]
    norm_ratio: dict[str, float]
    kl_nats: dict[str, float | None]

    @model_validator(mode="after")
    def _measured_at_the_same_temperatures(self) -> Self:
        if not self.angle_deg.keys() == self.norm_ratio.keys() == self.kl_nats.keys():
            raise ValueError("angle_deg, norm_ratio and kl_nats must name the same temperatures")
        if any(_TEMPERATURE.fullmatch(tau) is None for tau in self.angle_deg):
            raise ValueError(f"temperatures must be plain positive numbers, found {sorted(self.angle_deg)}")
        return self


class HiddenPoint(_Strict):
    """How well the hidden states of one layer are kept, over positions that are held out.

    bytes_per_position: of all positions, kept or not; table_bytes_per_position: its tables, spread over the cache.
    relative_error: mean of |stored - true| / |true|. angle_deg, norm_ratio: between the mean gradients of the loss on
    hidden states in its projection, for a student, from stored and from true states.
    """

    layer: Annotated[int, Field(ge=0)]
    bytes_per_position: Annotated[float, Field(ge=0)]
    table_bytes_per_position: Annotated[float, Field(ge=0)]
    relative_error: Annotated[float, Field(ge=0)]
    angle_deg: float
    norm_ratio: float


class Calibration(_Strict):
    """The measured curve of a dump.

    request: fingerprint of all that the tables were made from. profile, hidden: as they were resolved.
    """

    request: str
    student: str
    positions: Annotated[int, Field(ge=0)]
    profile: dict[str, Any]
    target: str | None
    points: tuple[FidelityPoint, ...]
    chosen: int | None
    hidden: dict[str, Any] | None = None
    hidden_points: tuple[HiddenPoint, ...] = ()

    @model_serializer(mode="wrap")
    def _without_hidden_states_if_there_are_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.hidden is None:
            del fields["hidden"], fields["hidden_points"]
        return fields

    @model_validator(mode="after")
    def _chosen_is_a_point(self) -> Self:
        if self.chosen is not None and not 0 <= self.chosen < len(self.points):
            raise ValueError(f"chosen is {self.chosen}, but there are {len(self.points)} points")
        return self

    def to_json(self) -> str:
        """Canonical JSON, as stored."""
        return canonical_json(self.model_dump(mode="json"))
