"""One commit point: a file is there whole under its name, or it is not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
"""Never writes into what stands there: a link, put there by others, would have the bytes go elsewhere."""


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Make durable what another library has written to a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_of(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def names_file(path: Path) -> Iterator[None]:
    """An OSError in the block that names no file, as that of a full disk, names this one."""
    try:
        yield
    except OSError as exc:
        if exc.filename is None:
            exc.filename = str(path)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write and seek in, that appears as `path` when the block ends and never before.

    It is written as `.<name>.partial` in the same folder, flushed, synced and renamed. If the block raises, the
    partial file is removed and an earlier `path` is untouched. After a kill the partial file stays; the next write of
    the same path replaces it. One process at a time may write a path. Errors name the file.
    """
    partial = partial_of(path)
    try:
        partial.unlink(missing_ok=True)
        with names_file(path), os.fdopen(os.open(partial, _NEW_FILE, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # as of a file system that can only be read, which is told already
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the content of `path` in one step that survives a crash."""
    with atomic_file(path) as file:
        file.write(content)
