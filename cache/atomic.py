"""One commit point: a file is there whole under its name, or it is not there."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
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


def partial_of(path: Path, number: int = 1) -> Path:
    """Where a file is until it is whole; of several that are written at once, each has a number."""
    return path.with_name(f".{path.name}.partial" if number == 1 else f".{path.name}.{number}.partial")


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
    partial file is removed and an earlier `path` is untouched. Writers of one path at the same time, in any processes
    and threads, have a partial file each, and the last one to finish wins. After a kill the partial file stays; the
    next writer of the path, which finds it unlocked, replaces it. Errors name the file.
    """
    with names_file(path):
        partial, descriptor = _own_partial(path)
    try:
        with names_file(path), os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)  # while it is locked: until then nobody takes it for one that a kill has left
    except BaseException:
        with suppress(OSError):  # as of a file system that can only be read, which is told already
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _own_partial(path: Path) -> tuple[Path, int]:
    """A new partial file of this writer alone, locked where the file system has locks, and its descriptor."""
    for number in count(1):
        partial = partial_of(path, number)
        _remove_abandoned(partial)
        try:
            descriptor = os.open(partial, _NEW_FILE, 0o666)
        except FileExistsError:
            continue
        if _is_locked(descriptor) is not False and _is_at(partial, descriptor):
            return partial, descriptor
        os.close(descriptor)  # another writer looked at it before it was locked, and may remove it
    raise AssertionError("numbers do not end")


def _remove_abandoned(partial: Path) -> None:
    """Remove a partial file of which a lock shows that no writer is left; links at once, which no writer makes."""
    try:
        if partial.is_symlink():
            partial.unlink()
            return
        descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # there is none, as a rule
        return
    try:
        if _is_locked(descriptor) and _is_at(partial, descriptor):
            with suppress(OSError):  # of a folder of that name, which no writer makes
                partial.unlink()
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool | None:
    """Whether this process has locked the file now; None on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the content of `path` in one step that survives a crash."""
    with atomic_file(path) as file:
        file.write(content)
