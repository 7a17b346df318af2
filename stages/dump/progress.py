"""How far all ranks of a dump are together, as the first of them shows it."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tristill.stages.progress import Progress
from tristill.stages.ranks import Ranks

_LOOK_EVERY_S = 1.0
_LOOKING_SHARE = 0.02
"""Of the time at most that is spent on looking at a folder that is slow to list."""


@contextmanager
def shown_progress(
    ranks: Ranks, folder: Path, positions: int, missing: int, others: Mapping[str, int]
) -> Iterator[Callable[[int], None]]:
    """Takes the positions that this rank has finished, and shows how far all are.

    positions, missing: of the whole cache, and of the shards that were missing at the start. others: positions of
    those that other ranks write, by their names. Nobody is told of them: a shard counts once it lies in the folder.
    """
    if not ranks.is_first:
        yield lambda _: None
        return
    with Progress("dump-logits", positions, "positions", positions - missing) as progress:
        if not ranks.are_many:
            yield progress.advance
            return
        watch = _Watch(progress, folder, others)
        try:
            yield watch.add_own
            watch.end(missing)
        finally:
            watch.stop()


class _Watch:
    """Counts the shards of others in a thread, which alone touches the progress."""

    def __init__(self, progress: Progress, folder: Path, others: Mapping[str, int]) -> None:
        self._progress, self._folder = progress, folder
        damaged = _names_in(folder) & others.keys()  # they lie there until they are replaced
        self._others = {name: positions for name, positions in others.items() if name not in damaged}
        self._own = self._shown = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def add_own(self, positions: int) -> None:
        """This rank has finished so many more."""
        self._own += positions

    def end(self, missing: int) -> None:
        """All ranks are done."""
        self.stop()
        self._show(missing)

    def stop(self) -> None:
        """Look no more."""
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        pause_s = _LOOK_EVERY_S
        while not self._is_over.wait(pause_s):
            started_s = time.monotonic()
            self._show(self._own + sum(self._others[name] for name in _names_in(self._folder) & self._others.keys()))
            pause_s = max(_LOOK_EVERY_S, (time.monotonic() - started_s) / _LOOKING_SHARE)

    def _show(self, positions: int) -> None:
        self._progress.advance(max(0, positions - self._shown))
        self._shown = max(self._shown, positions)


def _names_in(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError:  # whoever writes there says what is wrong with it
        return set()
