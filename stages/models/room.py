"""Whether the files of weights have room for what a description says, looked at before anything takes memory."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from tristill.cache.regular_file import require_regular
from tristill.stages.errors import CheckpointError
from tristill.stages.models.description import CONFIG_NAME, WEIGHTS_NAME

_COUNTS = ("layer", "depth", "block", "expert")
"""Words in the names of numbers of parts, of which each has tensors."""
_FEWEST_PARTS = 2048
_SMALL_BUFFERS = 2**28
"""Numbers that are not among the weights, such as angles of positions, in models of any size."""


def require_room(folder: Path, parameters: int, *, per_byte: int = 1) -> None:
    """Refuses a description of more parameters than the files of weights have room for. per_byte: packed ones."""
    num_bytes = sum(_regular(path).stat().st_size for path in _weights(folder))
    if parameters > num_bytes * per_byte:
        raise CheckpointError(
            f"{folder}: found {num_bytes} bytes of weights, but {folder / CONFIG_NAME} describes {parameters} "
            f"parameters; put the file of weights there that belongs to it ({WEIGHTS_NAME})"
        )


def require_room_for_parts(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses a description of more layers or experts than the files of weights have tensors."""
    most = max(_FEWEST_PARTS, sum(map(_num_tensors, _weights(folder))))
    for key, value in _numbers(config):
        if value > most and any(word in key for word in _COUNTS):
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: found {key} = {value}, expected at most {most}, the number of tensors in its "
                "files of weights, or fewer; put the description there that belongs to them"
            )


def described_parameters(make: Callable[[], torch.nn.Module]) -> int:
    """How many parameters the module has that `make` would make; none of them is."""
    with torch.device("meta"):
        module = make()
    buffers = sum(buffer.numel() for buffer in module.buffers())
    return sum(parameter.numel() for parameter in module.parameters()) + max(0, buffers - _SMALL_BUFFERS)


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _regular(path: Path) -> Path:
    try:
        require_regular(path)
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({exc})") from exc
    return path


def _num_tensors(path: Path) -> int:
    try:
        with safetensors.safe_open(_regular(path), "pt") as file:
            return len(file.keys())
    except (OSError, safetensors.SafetensorError) as exc:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({exc})") from exc


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _numbers(part, str(name))
    elif isinstance(value, int | float):
        yield key, value
