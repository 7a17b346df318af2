"""Checkpoints to resume from: safetensors and JSON in a folder that appears whole or not at all."""

import json
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from cache.atomic import sync_folder
from stages.errors import CheckpointError
from stages.models.folder import read_tensors

_RNG = "rng_state"


def save_checkpoint(
    folder: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, elapsed_s: float
) -> None:
    """Commit the state after `step` steps as `folder/step-XXXXXXXX`, then remove the checkpoint before it.

    Schedule and data position are pure functions of the step.
    """
    path = folder / f"step-{step:08d}"
    partial = folder / f".step-{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parameters = {id(parameter): name for name, parameter in module.named_parameters()}
    state = {
        f"{parameters[id(parameter)]}/{key}": value.contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    _write(partial / "module.safetensors", safetensors.torch.save(_own_tensors(module)))
    _write(partial / "optimizer.safetensors", safetensors.torch.save({**state, _RNG: torch.get_rng_state()}))
    _write(partial / "state.json", json.dumps({"step": step, "elapsed_s": elapsed_s}).encode())
    sync_folder(partial)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    sync_folder(folder)
    for older in _checkpoints(folder)[:-1]:
        shutil.rmtree(older)


def load_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Restore the last checkpoint; (steps done, seconds spent), or (0, 0.0) where there is none."""
    found = _checkpoints(folder)
    if not found:
        return 0, 0.0
    path = found[-1]
    try:
        state = json.loads((path / "state.json").read_bytes())
        module.load_state_dict(read_tensors(path / "module.safetensors"), strict=False)
        optimizer_state = read_tensors(path / "optimizer.safetensors")
        torch.set_rng_state(optimizer_state.pop(_RNG))
        parameters = dict(module.named_parameters())
        for name, value in optimizer_state.items():
            parameter_name, key = name.rsplit("/", 1)
            parameter = parameters[parameter_name]
            optimizer.state[parameter][key] = value.to(parameter.device)
        return int(state["step"]), float(state["elapsed_s"])
    except (OSError, ValueError, KeyError, RuntimeError, CheckpointError) as exc:
        raise CheckpointError(
            f"{path}: cannot be resumed from ({exc}); delete it to start from the one before"
        ) from exc


def clear_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a finished training."""
    for path in [*_checkpoints(folder), *folder.glob(".step-*.partial")]:
        shutil.rmtree(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, tied ones under their first name."""
    return {name: parameter.detach().contiguous() for name, parameter in module.named_parameters()}


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
