"""Checkpoints to resume from: safetensors and JSON in a folder that appears whole or not at all."""

import shutil
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from cache.atomic import sync_folder, write_atomically
from stages.errors import CheckpointError
from stages.models.folder import read_tensors

_RNG = "rng_state"


class TrainingState(BaseModel):
    """How far a training is: steps done, seconds spent, and the terms of the last loss that was logged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = 0
    elapsed_s: float = 0.0
    loss_terms: dict[str, float] = {}


def save_checkpoint(folder: Path, progress: TrainingState, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Commit the state after `progress.step` steps as `folder/step-XXXXXXXX`, then remove the checkpoint before it.

    Schedule and data position are pure functions of the step.
    """
    path = folder / f"step-{progress.step:08d}"
    partial = folder / f".step-{progress.step:08d}.partial"
    for left in folder.glob(".step-*.partial"):  # by a kill or a full disk, of any step: it takes room
        shutil.rmtree(left)
    partial.mkdir(parents=True)
    parameters = {id(parameter): name for name, parameter in module.named_parameters()}
    state = {
        f"{parameters[id(parameter)]}/{key}": value.contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    state[_RNG] = torch.get_rng_state()
    try:
        write_atomically(partial / "module.safetensors", safetensors.torch.save(_own_tensors(module)))
        write_atomically(partial / "optimizer.safetensors", safetensors.torch.save(state))
        write_atomically(partial / "state.json", progress.model_dump_json().encode())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk the room is wanted
        raise
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    sync_folder(folder)
    for other in folder.glob("step-*"):  # also one that a kill has left half removed
        if other != path:
            shutil.rmtree(other)


def load_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Restore the last checkpoint; how far the training was, or its start where there is none."""
    found = _checkpoints(folder)
    if not found:
        return TrainingState()
    path = found[-1]
    try:
        state = TrainingState.model_validate_json((path / "state.json").read_bytes())
        tensors = read_tensors(path / "module.safetensors")
        if tensors.keys() != _own_tensors(module).keys():
            raise ValueError("its tensors are not those of the model")  # noqa: TRY301 - one message for all
        module.load_state_dict(tensors, strict=False)  # tied weights are there under one of their names
        optimizer_state = read_tensors(path / "optimizer.safetensors")
        torch.set_rng_state(optimizer_state.pop(_RNG))
        parameters = dict(module.named_parameters())
        for name, value in optimizer_state.items():
            parameter_name, key = name.rsplit("/", 1)
            parameter = parameters[parameter_name]
            optimizer.state[parameter][key] = value.to(parameter.device)
        return state  # noqa: TRY300
    except (OSError, ValueError, KeyError, RuntimeError, CheckpointError) as exc:
        raise CheckpointError(f"{path}: cannot be resumed from ({exc}); delete it to train from the start") from exc


def seconds_kept(folder: Path) -> float:
    """Training seconds that lie in the last checkpoint; zero where there is none that can be read."""
    found = _checkpoints(folder)
    try:
        return TrainingState.model_validate_json((found[-1] / "state.json").read_bytes()).elapsed_s if found else 0.0
    except (OSError, ValueError):
        return 0.0  # whoever resumes from it says what is wrong


def clear_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a finished training."""
    for path in [*folder.glob("step-*"), *folder.glob(".step-*.partial")]:
        shutil.rmtree(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, tied ones under their first name; and every buffer."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
