"""What the config of this process names as trusted: folders whose Python code may run, and whose records are followed.

Nothing that is on disk beside a model can say so of itself.
"""

import json
import os
from pathlib import Path

_trusted: set[Path] = set()
_UNTRUSTED_RECORDS = "TRISTILL_UNTRUSTED_RECORDS"
"""Variable of the environment, which processes that this one starts have too: folders, as a list in JSON."""


def trust_code_of(folder: Path) -> None:
    """From now on, code that comes with the model in this folder runs when it is loaded."""
    _trusted.add(folder.resolve())


def is_trusted(folder: Path) -> bool:
    """Whether the config said so."""
    return folder.resolve() in _trusted


def trust_records_of(folder: Path, *, is_trusted: bool) -> None:
    """Whether records in this folder are followed from now on that name models elsewhere (origin.json)."""
    folders = _untrusted()
    (folders.discard if is_trusted else folders.add)(str(folder.resolve()))
    os.environ[_UNTRUSTED_RECORDS] = json.dumps(sorted(folders))


def follows_records_of(folder: Path) -> bool:
    """Whether a record in this folder may name a model elsewhere."""
    place = folder.resolve()
    return not any(place.is_relative_to(one) for one in _untrusted())


def _untrusted() -> set[str]:
    return set(json.loads(os.environ.get(_UNTRUSTED_RECORDS) or "[]"))
