"""Locks between processes of one machine: the system frees them when a process ends, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCKS_FOLDER = ".locks"


@contextmanager
def lock(folder: Path, name: str, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of this name in a folder; whether it is held, which without `wait` it may not be.

    Between threads too. The file of a lock stays: one that was removed while others wait for it would lock nothing.
    """
    place = folder / LOCKS_FOLDER
    place.mkdir(exist_ok=True)
    descriptor = os.open(place / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
