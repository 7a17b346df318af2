"""Ctrl-C that waits for a safe point."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class InterruptFlag:
    """Set when the user asked to stop."""

    def __init__(self) -> None:
        self.is_set = False


@contextmanager
def deferred_interrupt() -> Iterator[InterruptFlag]:
    """The first SIGINT sets the flag, for the caller to save its state and stop; a second one interrupts at once."""
    flag = InterruptFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if flag.is_set:
            signal.default_int_handler(signum, frame)
        flag.is_set = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
