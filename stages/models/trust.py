"""Whose Python code may run: the folders that the config of this process names as trusted, and no others.

Nothing that is on disk beside a model can say so of itself.
"""

from pathlib import Path

_trusted: set[Path] = set()


def trust_code_of(folder: Path) -> None:
    """From now on, code that comes with the model in this folder runs when it is loaded."""
    _trusted.add(folder.resolve())


def is_trusted(folder: Path) -> bool:
    """Whether the config said so."""
    return folder.resolve() in _trusted
