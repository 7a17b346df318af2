"""`metrics.jsonl`: one line every few steps."""

import json
import math
from pathlib import Path
from typing import Any

from cache.atomic import write_atomically


class MetricsLog:
    """Appends records; on resume it first drops those of steps that will be done again."""

    def __init__(self, path: Path, steps_done: int) -> None:
        self._path = path
        kept = [line for line in _complete_lines(path) if _step_of(line) <= steps_done]
        write_atomically(path, b"".join(line + b"\n" for line in kept))

    def append(self, record: dict[str, Any]) -> None:
        """Write one record at once, so that a running training can be watched."""
        with self._path.open("a", encoding="ascii") as file:
            file.write(json.dumps(record) + "\n")


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # damaged, as after a loss of power: dropped


def _complete_lines(path: Path) -> list[bytes]:
    """Lines that end in a newline; a kill may have cut the last one."""
    content = path.read_bytes() if path.is_file() else b""
    return content.split(b"\n")[:-1]
