"""Training records as TensorBoard scalars: an event file beside `metrics.jsonl`, with the same numbers in float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tristill.stages.errors import StageError


class TensorBoardLog:
    """Appends records to `folder`; events of steps that are done again are marked as void by their step."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as exc:
            raise StageError(
                f"training.tensorboard is on and the package tensorboard cannot be imported ({exc}); "
                "pip install 'tristill[tensorboard]', or set training.tensorboard to false"
            ) from exc
        self._writer = SummaryWriter(folder, purge_step=steps_done + 1)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record at once; `step` is the axis, a number in a table is named TABLE/KEY."""
        for tag, value in _scalars(record):
            self._writer.add_scalar(tag, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", number) for key, number in value.items())
        elif name != "step":
            yield name, value
