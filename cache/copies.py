"""Folders of this process that are local copies of caches at URLs; whoever opens such a folder is served from there.

The program says once, where it knows the config, which folders these are; a folder itself is not asked, since it may
come from anywhere.
"""

from pathlib import Path
from typing import Protocol


class Copy(Protocol):
    """What a folder is a copy of."""

    def refresh(self) -> None:
        """Bring manifest, tables and tokenizer, unless this process has them. Raises CacheMissingError."""
        ...


_COPIES: dict[Path, Copy] = {}


def set_copy(folder: Path, copy: Copy | None) -> None:
    """Say what a folder is a copy of; None: of nothing."""
    if copy is None:
        _COPIES.pop(folder.absolute(), None)
    else:
        _COPIES[folder.absolute()] = copy


def copy_in(folder: Path) -> Copy | None:
    """What a folder is a copy of, None if it is a cache of its own."""
    return _COPIES.get(folder.absolute())
