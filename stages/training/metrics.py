"""What is logged every few steps: `metrics.jsonl`, and TensorBoard scalars if they are asked for."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tristill.cache.atomic import names_file, sync_file, write_atomically
from tristill.cache.regular_file import parsed_json
from tristill.stages.progress import say
from tristill.stages.training.tensorboard import TensorBoardLog


class MetricsLog:
    """Appends records to `metrics.jsonl` in a folder, and to `tensorboard/` there if that is on; a context manager.

    On resume it first drops records of steps that will be done again, and says if some of those before are lost.
    """

    def __init__(
        self, folder: Path, steps_done: int, num_records: int | None = None, *, tensorboard: bool = False
    ) -> None:
        """num_records: of the steps that are done, as the checkpoint counts them; None if it does not say."""
        self._scalars = TensorBoardLog(folder / "tensorboard", steps_done) if tensorboard else None
        self._path = folder / "metrics.jsonl"
        kept = [line for line in _complete_lines(self._path) if _step_of(line) <= steps_done]
        if num_records is not None and len(kept) < num_records:
            say(
                f"{self._path}: found {len(kept)} of the {num_records} records up to step {steps_done}; the others "
                "are lost, and the training goes on from its checkpoint as if they were there"
            )
        write_atomically(self._path, b"".join(line + b"\n" for line in kept))
        self._num_records = len(kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._scalars is not None:
            self._scalars.close()
        if error is None:
            self.sync()

    def sync(self) -> int:
        """Make all records durable; how many there are."""
        with names_file(self._path):
            sync_file(self._path)
            for events in self._path.parent.glob("tensorboard/events.*"):
                sync_file(events)
        return self._num_records

    def append(self, record: dict[str, Any]) -> None:
        """Write one record at once, so that a running training can be watched."""
        with names_file(self._path), self._path.open("a", encoding="ascii") as file:
            file.write(json.dumps(record) + "\n")
        self._num_records += 1
        if self._scalars is not None:
            self._scalars.append(record)


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """The records in a folder's `metrics.jsonl`, as MetricsLog has left them."""
    yield from map(json.loads, _complete_lines(folder / "metrics.jsonl"))


def _step_of(line: bytes) -> float:
    try:
        return int(parsed_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # damaged, as after a loss of power: dropped


def _complete_lines(path: Path) -> list[bytes]:
    """Lines that end in a newline; a kill may have cut the last one."""
    content = path.read_bytes() if path.is_file() else b""
    return content.split(b"\n")[:-1]
