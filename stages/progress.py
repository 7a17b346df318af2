"""Progress of long work on stderr: a bar on a terminal, plain lines otherwise. Of many ranks the first alone speaks."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from tqdm import tqdm

from tristill.stages.ranks import current_ranks
from tristill.stages.visible import visible_lines

_PLAIN_LINE_EVERY_S = 5.0
_TICK_S = 0.5


def say(text: str) -> None:
    """A message for the user that is not the result; above a bar, if there is one. Its own lines are indented."""
    if not current_ranks().is_first:
        return
    tqdm.write(visible_lines(text), file=sys.stderr)
    sys.stderr.flush()


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """Says from time to time how long the block has lasted: for work of which nothing can be counted."""
    started_s = time.monotonic()
    is_over = threading.Event()
    is_told = False

    def tell_in_lines() -> None:
        nonlocal is_told
        while not is_over.wait(_pause_s(time.monotonic() - started_s)):
            say(f"{label}: {time.monotonic() - started_s:,.0f} s")
            is_told = True

    def tell_in_place() -> None:
        with tqdm(desc=label, bar_format="{desc}: {elapsed}", leave=False, dynamic_ncols=True, file=sys.stderr) as line:
            while not is_over.wait(_TICK_S):
                line.refresh()

    thread = threading.Thread(target=tell_in_place if sys.stderr.isatty() else tell_in_lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    if is_told:
        say(f"{label}: {time.monotonic() - started_s:,.0f} s, done")


def _pause_s(elapsed_s: float) -> float:
    """Until the next plain line: there is one after 1, 2, 4 and 8 s, then every 5 s, in the end at every hundredth."""
    return max(1.0, min(elapsed_s, _PLAIN_LINE_EVERY_S), elapsed_s / 100)


class Progress:
    """Counts units of work, and shows speed, time left and a short note."""

    def __init__(self, label: str, total: int | None, unit: str, done: int = 0) -> None:
        """`done` units were done before a resume: they count for the percentage, not for the speed."""
        self._label, self._total, self._unit = label, total, unit
        self._done = self._start_done = done
        self._start_s = time.monotonic()
        self._next_line_s = _pause_s(0)
        self._note = ""
        self._bar = (
            tqdm(total=total, initial=done, desc=label, unit=f" {unit}", unit_scale=True, dynamic_ncols=True)
            if sys.stderr.isatty() and current_ranks().is_first
            else None
        )

    def advance(self, units: int, note: str = "") -> None:
        """Report `units` more done."""
        self._done += units
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(units)
        elif self.elapsed_s >= self._next_line_s:
            self._print_line()
            self._next_line_s = self.elapsed_s + _pause_s(self.elapsed_s)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not counted."""
        started_s = time.monotonic()
        yield
        self._start_s += time.monotonic() - started_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, pauses left out."""
        return time.monotonic() - self._start_s

    @property
    def units_per_s(self) -> float:
        """Mean speed since the start."""
        return (self._done - self._start_done) / max(self.elapsed_s, 1e-9)

    def _print_line(self) -> None:
        parts = [f"{self._label}: {self._done:,}"]
        if self._total:
            parts[0] += f" of {self._total:,} ({self._done / self._total:.0%})"
        parts[0] += f" {self._unit}"
        parts.append(f"{self.units_per_s:,.0f} {self._unit}/s")
        if self._total and self.units_per_s > 0 and self._done < self._total:
            parts.append(f"{(self._total - self._done) / self.units_per_s:,.0f} s left")
        parts.append(self._note)
        say(", ".join(part for part in parts if part))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print_line()
