"""Ctrl-C that waits for a safe point."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def ending_signals() -> list[signal.Signals]:
    """Those that ask this process to end, closed terminals' among them; none that it was started to ignore.

    A shell has SIGINT ignored by what runs in its background, and `nohup` SIGHUP.
    """
    signals = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    return [signum for signum in signals if signal.getsignal(signum) != signal.SIG_IGN]


class InterruptFlag:
    """Set when the user asked to stop."""

    def __init__(self) -> None:
        self.is_set = False


@contextmanager
def deferred_interrupt() -> Iterator[InterruptFlag]:
    """SIGINT, SIGTERM or SIGHUP sets the flag, for the caller to save its state and stop; a second SIGINT ends it."""
    flag = InterruptFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(signum: int, frame: FrameType | None) -> None:
        # `run` sends a SIGTERM after the SIGINT that a terminal sends to all: that is one wish, not two.
        if flag.is_set and signum == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        flag.is_set = True

    previous = {signum: signal.signal(signum, note) for signum in ending_signals()}
    try:
        yield flag
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
