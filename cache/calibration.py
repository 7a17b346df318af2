"""What was measured before a dump, and what was chosen: kept with the tables and repeated in the manifest."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cache.hashing import canonical_json


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


class Calibration(_Strict):
    """The measured curve of a dump.

    request: fingerprint of all that the tables were made from. profile: the profile as it was resolved.
    """

    request: str
    student: str
    positions: Annotated[int, Field(ge=0)]
    profile: dict[str, Any]
    target: str | None
    points: tuple[FidelityPoint, ...]
    chosen: int | None

    @model_validator(mode="after")
    def _chosen_is_a_point(self) -> Self:
        if self.chosen is not None and not 0 <= self.chosen < len(self.points):
            raise ValueError(f"chosen is {self.chosen}, but there are {len(self.points)} points")
        return self

    def to_json(self) -> str:
        """Canonical JSON, as stored."""
        return canonical_json(self.model_dump(mode="json"))
