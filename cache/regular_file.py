"""Files that others may have put there: opened without following links, read up to a bound."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

LARGEST_JSON_BYTES = 2**26


class IrregularFileError(ValueError):
    """What stands there is a link, a pipe or a device, or is larger than it may be; the text begins with `is`."""


def open_regular(path: Path) -> int:
    """A descriptor to read from. Raises IrregularFileError for all but a regular file, OSError if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno != errno.ELOOP:
            raise
        raise IrregularFileError("is a link, not a regular file") from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IrregularFileError("is not a regular file")
    return descriptor


def read_regular(path: Path, largest_bytes: int) -> bytes:
    """The bytes of a regular file; raises as open_regular, and for more than so many bytes before any is read."""
    with os.fdopen(open_regular(path), "rb") as file:
        if (found := os.fstat(file.fileno()).st_size) > largest_bytes:
            raise IrregularFileError(f"is of {found} bytes, expected at most {largest_bytes}")
        return file.read(found)


def sha256_of_regular_file(path: Path) -> str:
    """SHA-256, in hex, in constant memory; raises as open_regular."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_object(path: Path, largest_bytes: int = LARGEST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; links are followed, as hubs keep their files behind such.

    Raises OSError if there is none to read, ValueError for all that is no JSON object of moderate size and depth.
    """
    with path.open("rb") as file:
        if (found := os.fstat(file.fileno()).st_size) > largest_bytes:
            raise ValueError(f"found {found} bytes, expected at most {largest_bytes}")
        content = file.read(found)
    try:
        value = json.loads(content)
    except RecursionError as exc:
        raise ValueError("found lists or objects nested too deeply") from exc
    if not isinstance(value, dict):
        raise ValueError(f"found a {type(value).__name__}, expected an object")  # noqa: TRY004 - of a file
    return value
