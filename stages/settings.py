"""The base of all config sections: frozen, closed, documented; some fields are marked as affecting no numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

_NEUTRAL = {"affects_numbers": False}


class Section(BaseModel):
    """One table of the TOML config. Sections import no torch and stand beside the code that they configure."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    newer: ClassVar[tuple[str, ...]] = ()
    """Fields that are newer than artefacts on disk, whose records lack them."""

    def numbers(self) -> dict[str, Any]:
        """The settings that affect results, as plain JSON values; the rest may change without invalidating anything.

        Newer ones count only where they are not the default, so that older records remain valid.
        """
        plain = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if not affects_numbers(field) or (name in self.newer and value == field.default):
                del plain[name]
            elif isinstance(value, Section):
                plain[name] = value.numbers()
        return plain


@dataclass(frozen=True)
class Outside:
    """Mark of a field whose value is read, written, fetched or run: a path, a URL, a name on the hub, or consent.

    A config that comes with a run folder may use it for what lies in that folder alone; see pipeline/received.py.
    is_path: a path in the folder leads nowhere else. Otherwise whatever is given leads out.
    """

    is_path: bool = True

    def leads_out(self, value: Any, folder: Path) -> bool:
        """Whether a value of the field names anything outside of the folder."""
        if not value or not self.is_path:
            return bool(value)
        home = folder.resolve()
        names = value if isinstance(value, tuple | list) else (value,)
        return any("://" in str(name) or not _resolved(name).is_relative_to(home) for name in names)


def _resolved(name: Path | str) -> Path:
    try:
        return Path(name).expanduser().resolve()
    except (RuntimeError, OSError, ValueError):  # no such user, a circle of links, a null byte
        return Path("/")


OUTSIDE = Outside()
"""A path, a URL or a name."""
ALWAYS_OUTSIDE = Outside(is_path=False)
"""What leads out whatever it is."""


def normalised(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights divided by their sum."""
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def affects_numbers(field: FieldInfo) -> bool:
    """Whether a change of this field changes results."""
    return field.json_schema_extra != _NEUTRAL


def neutral(description: str, **bounds: Any) -> Any:
    """A field that changes no result: paths, devices, log intervals."""
    return Field(description=description, json_schema_extra=dict(_NEUTRAL), **bounds)
