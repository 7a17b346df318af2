"""Files that others may have put there: opened without waiting for anybody, read up to a bound."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

LARGEST_JSON_BYTES = 2**26


class IrregularFileError(OSError, ValueError):
    """What stands there is a link, a pipe or a device, or is larger than it may be; the text begins with `is`."""

    def __init__(self, text: str, path: Path) -> None:
        super().__init__(text)
        self.filename = str(path)
        self._text = text

    def __str__(self) -> str:
        return self._text  # without the name, as callers have it


def open_regular(path: Path, *, follows_links: bool = False) -> int:
    """A descriptor to read from. Raises IrregularFileError for all but a regular file, OSError if there is none."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follows_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            raise IrregularFileError("is not a regular file", path) from exc  # but a socket
        if exc.errno != errno.ELOOP or follows_links:
            raise
        raise IrregularFileError("is a link, not a regular file", path) from exc
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        if follows_links and stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise IrregularFileError("is not a regular file", path)
    return descriptor


def read_regular(path: Path, largest_bytes: int, *, follows_links: bool = False) -> bytes:
    """The bytes of a regular file; raises as open_regular, and for more than so many bytes before any is read."""
    with os.fdopen(open_regular(path, follows_links=follows_links), "rb") as file:
        if (found := os.fstat(file.fileno()).st_size) > largest_bytes:
            raise IrregularFileError(f"is of {found} bytes, expected at most {largest_bytes}", path)
        return file.read(found)


def read_file(path: Path, largest_bytes: int = LARGEST_JSON_BYTES) -> bytes:
    """The bytes of a file outside of a cache: as read_regular, but links are followed, as hubs have such."""
    return read_regular(path, largest_bytes, follows_links=True)


def require_regular(path: Path) -> None:
    """Raise as open_regular, links followed: before a library opens the file, which may wait for ever."""
    os.close(open_regular(path, follows_links=True))


def require_regular_files(folder: Path) -> None:
    """The same of every file in a folder that a library may open by a name of its own."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir():
            require_regular(path)


def sha256_of_regular_file(path: Path) -> str:
    """SHA-256, in hex, in constant memory; raises as open_regular."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_object(path: Path, largest_bytes: int = LARGEST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; links are followed, as hubs keep their files behind such.

    Raises OSError if there is none to read, ValueError for all that is no JSON object of moderate size and depth.
    """
    value = parsed_json(read_file(path, largest_bytes))
    if not isinstance(value, dict):
        raise ValueError(f"found a {type(value).__name__}, expected an object")  # noqa: TRY004 - of a file
    return value


def parsed_json(content: bytes | str) -> Any:
    """What JSON text says. Raises ValueError for all that is none, or is nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError as exc:
        raise ValueError("found lists or objects nested too deeply") from exc
