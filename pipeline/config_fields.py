"""What may stand in a config, and what stands in one: keys, types, bounds and defaults in words."""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tristill.cache.secrets import masked
from tristill.pipeline.config import Config, displaced, kind_of, section_types
from tristill.pipeline.errors import ConfigError
from tristill.stages.settings import affects_numbers

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Known:
    """A field of the config. key: dotted, the same in every kind of a table. section: the table that it stands in."""

    key: str
    name: str
    section: type[BaseModel]

    @property
    def field(self) -> FieldInfo:
        """As pydantic has it."""
        return self.section.model_fields[self.name]

    @property
    def kind(self) -> str | None:
        """The kind of table that has it; None if there is but one."""
        return kind_of(self.section)


def known_fields(section: type[BaseModel], path: str = "", above: tuple[type[BaseModel], ...] = ()) -> Iterator[Known]:
    """Every field of a section and those below it."""
    for name, field in section.model_fields.items():
        key = f"{path}.{name}".lstrip(".")
        yield Known(key, name, section)
        for below in section_types(field.annotation):
            if below not in above:
                yield from known_fields(below, key, (*above, section))


def type_name(field: FieldInfo) -> str:
    """Type and bounds."""
    bounds = [
        f"{symbol} {getattr(bound, name)}"
        for bound in field.metadata
        for name, symbol in _BOUNDS.items()
        if hasattr(bound, name)
    ]
    return ", ".join([_annotation_name(field.annotation), *bounds])


def _annotation_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if section_types(annotation) and tuple in {origin, *map(typing.get_origin, arguments)}:
        name = "list of tables" + (" or none" if type(None) in arguments else "")
    elif section_types(annotation):
        number = "number or " if _holds_a_number(annotation) else ""
        name = f"{number}table" + (" or none" if type(None) in arguments else "")
    elif origin is typing.Literal:
        name = " or ".join(f'"{choice}"' for choice in arguments)
    elif origin is Annotated:
        name = _annotation_name(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        name = " or ".join(_annotation_name(part) for part in arguments)
    elif origin is tuple:
        name = f"list of {_annotation_name(arguments[0])}"
    else:
        plain = {"NoneType": "none", "str": "text", "bool": "true or false", "Path": "path", "dict": "table"}
        own = (origin or annotation).__name__
        name = plain.get(own, own)
    return name


def _holds_a_number(annotation: Any) -> bool:
    """Whether a number may stand in place of a table."""
    return annotation is float or any(map(_holds_a_number, typing.get_args(annotation)))


def default_text(field: FieldInfo) -> str:
    """The default as JSON; `required`, `none`, `empty` or `see below` where it is no plain value."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined or isinstance(default, BaseModel | dict):
        return "see below" if isinstance(default, BaseModel) else "empty"
    if default is None:
        return "none"
    return f"`{list(default)}`" if isinstance(default, tuple) else f"`{json.dumps(default)}`"


def config_text(config: Config) -> str:
    """The complete config as TOML, with a comment behind every setting that is not the default."""
    plain = config.model_dump(mode="json", exclude_none=True)
    notes = dict(_changed(config, ""))
    table, lines = "", []
    for line in tomli_w.dumps(plain).splitlines():
        if header := re.fullmatch(r"\[([^\[\]]+)\]", line):
            table = header[1]
        elif line.startswith("[["):
            table = "a list of tables, of which none is marked"
        key = f"{table}.{line.partition(' = ')[0]}".lstrip(".")
        lines.append(f"{line}  # {notes[key]}" if key in notes and " = " in line else line)
    return "\n".join(lines) + "\n"


def _changed(section: BaseModel, path: str) -> Iterator[tuple[str, str]]:
    """(dotted key, what its default is) of every setting that is not the default."""
    for name, field in type(section).model_fields.items():
        key, value = f"{path}.{name}".lstrip("."), getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _changed(value, key)
        elif field.is_required():
            yield key, "set; it has no default"
        elif value != field.get_default(call_default_factory=True, validated_data={}):
            yield key, f"set; the default is {default_text(field).strip('`')}"


def explanation(key: str) -> str:
    """What is known of a setting. Raises ConfigError, with the nearest keys, if there is none of that name."""
    parts = [part for part in key.split(".") if not part.isdigit()]
    if parts[0] in ("variants", "stages") and len(parts) > 2:  # the same, of a further student
        parts = parts[2:]
    plain = ".".join(parts)
    known = list(known_fields(Config))
    found = [one for one in known if one.key == plain]
    if not found:
        keys = sorted({one.key for one in known})
        near = [one for one in keys if one.endswith(f".{parts[-1]}")] or difflib.get_close_matches(plain, keys, n=5)
        hint = f"did you mean {', '.join(near[:5])}?" if near else "`tristill config show` prints all that a run has"
        raise ConfigError(f"{masked(key)}: unknown key; {hint}")
    return "\n\n".join(dict.fromkeys(map(_explained, found)))


def _explained(known: Known) -> str:
    where = f', of kind = "{known.kind}"' if known.kind and known.name != "kind" else ""
    default = known.field.get_default(call_default_factory=True, validated_data={})
    is_table = isinstance(default, BaseModel)
    shown = (kind_of(type(default)) or "its keys'") if is_table else default_text(known.field).strip("`")
    lines = [f"{known.key}{where}: {type_name(known.field)}; default: {shown}"]
    lines.append(f"  {known.field.description}")
    if others := [name for name in displaced({known.name}) if name in known.section.model_fields]:
        lines.append(f"  takes the place of {' and '.join(sorted(others))} when it is set over a config that has them")
    if not affects_numbers(known.field):
        lines.append("  changes no result: may differ without making anything stale")
    for section in section_types(known.field.annotation):
        kind = f'kind = "{kind_of(section)}": ' if kind_of(section) else ""
        lines.append(f"  {kind}{', '.join(name for name in section.model_fields if name != 'kind')}")
    return "\n".join(lines)
