"""What a config taken from a run folder may not do: name something outside of that folder.

A run folder may come from anybody. Its config counts as the user's own only where --config names it; taken from the
folder that --run-dir names, its fields marked OUTSIDE hold for what lies in the folder alone.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tristill.cache.secrets import masked
from tristill.pipeline.errors import OutsideError
from tristill.stages.settings import Outside

_SHOWN_CHARACTERS = 100
_SHOWN_LINKS = 5


def named_outside(section: BaseModel, run_dir: Path, given: Collection[str]) -> dict[str, Any]:
    """Values that name something outside of the run folder, by dotted key, without those `given` on the command line.

    A key of a table that was given whole was given too.
    """
    return {
        key: value
        for key, mark, value in _marked(section, "")
        if mark.leads_out(value, run_dir) and not any(key == one or key.startswith(f"{one}.") for one in given)
    }


def _marked(value: Any, path: str) -> Iterator[tuple[str, Outside, Any]]:
    """(dotted key, mark, value) of all marked fields of a section and those below it."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            key, found = f"{path}.{name}".lstrip("."), getattr(value, name)
            marks = [mark for mark in field.metadata if isinstance(mark, Outside)]
            yield from ((key, mark, found) for mark in marks)
            if not marks:
                yield from _marked(found, key)
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _marked(part, f"{path}.{name}")
    elif isinstance(value, tuple | list):
        yield from _marked({str(place): part for place, part in enumerate(value)}, path)


def refuse_outside(named: Mapping[str, Any], run_config: Path) -> None:
    """Raise OutsideError if there is any."""
    if named:
        raise OutsideError(
            f"{run_config}: names what lies outside of its run folder, which may come from anybody:\n"
            + "\n".join(f"  {key} = {_shown(value)}" for key, value in named.items())
            + f"\nif you trust all of it, name the config yourself: --config {run_config}; or give your own values "
            "with --set"
        )


def left_out_text(named: Mapping[str, Any], run_config: Path) -> str:
    """One line on what a command does without."""
    found = ", ".join(f"{key} = {_shown(value)}" for key, value in named.items())
    return f"left out, since {run_config} names it outside of its run folder: {found}; --config {run_config} takes it"


def refuse_links(run_dir: Path, run_config: Path) -> None:
    """Raise OutsideError for links in the run folder that lead out of it."""
    home = run_dir.resolve()
    found = (Path(folder, name) for folder, folders, files in os.walk(run_dir) for name in (*folders, *files))
    links = [
        f"  {path} -> {_shown(path.readlink())}"
        for path in found
        if path.is_symlink() and not path.resolve().is_relative_to(home)
    ]
    if links:
        more = [f"  and {len(links) - _SHOWN_LINKS} more"] if len(links) > _SHOWN_LINKS else []
        raise OutsideError(
            f"{run_dir}: holds links that lead out of it, and a run folder may come from anybody:\n"
            + "\n".join([*sorted(links)[:_SHOWN_LINKS], *more])
            + f"\nif you trust them, name the config yourself: --config {run_config}; or put in their place what they "
            "lead to"
        )


def _shown(value: Any) -> str:
    text = masked(repr(list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value))
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
