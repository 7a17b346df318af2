"""Checkpoints to resume from: safetensors and JSON in a folder that appears whole or not at all.

A training alone, or of copies that are alike (DDP), writes one part. Where ranks share the tensors (FSDP) each writes
a part with its own rows: a tensor is then the rows of all parts in a row, and what is not shared is in the first. So
any number of ranks resumes from any number of parts.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tristill.cache.atomic import sync_folder, write_atomically
from tristill.cache.regular_file import read_file, require_regular
from tristill.stages.errors import CheckpointError
from tristill.stages.progress import say
from tristill.stages.ranks import ALONE, Ranks, current_ranks
from tristill.stages.threads import num_threads, torch_threads
from tristill.stages.training.parallel import first_own_row

_RNG = "rng_state"


class TrainingState(BaseModel):
    """How far a training is: steps done, seconds spent, and the terms of the last record.

    sums: those of RunningMeans since that record. parts: how many files of each kind there are. num_records:
    in `metrics.jsonl`, all of which were synced before; None in a checkpoint that was written before they were counted.
    threads: of torch, in each of so many ranks; sums are taken in another order with other numbers of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = 0
    elapsed_s: float = 0.0
    loss_terms: dict[str, float] = {}
    sums: dict[str, tuple[float, float]] = {}
    parts: int = 1
    num_records: int | None = None
    threads: int | None = None
    ranks: int = 1


@contextmanager
def threads_of_checkpoint(folder: Path, label: str) -> Iterator[None]:
    """As many threads of torch as the training whose last checkpoint is in `folder` has had, if it is of as many ranks.

    So the numbers that it ends with are those of a training that was never interrupted. All ranks must call it.
    """
    ranks, state = current_ranks(), _last_state(folder)
    threads = ranks.from_first(state.threads if state and state.ranks == ranks.world_size else None)
    if threads is None or threads == num_threads():
        yield
        return
    say(f"{label}: goes on with {threads} threads of torch, as it was begun; here it would take {num_threads()}")
    with torch_threads(threads):
        yield


def save_checkpoint(
    folder: Path,
    progress: TrainingState,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks = ALONE,
) -> None:
    """Commit the state after `progress.step` steps as `folder/step-XXXXXXXX`, then remove the checkpoint before it.

    Schedule and data position are pure functions of the step. All ranks must call it; it returns when all are done.
    """
    path = folder / f"step-{progress.step:08d}"
    partial = folder / f".step-{progress.step:08d}.partial"
    with ranks.agreeing():
        if ranks.is_first:
            for left in folder.glob(".step-*.partial"):  # by a kill or a full disk, of any step: it takes room
                shutil.rmtree(left)
            partial.mkdir(parents=True)
    tensors = _own_tensors(module)
    parameters = {id(parameter): name for name, parameter in module.named_parameters()}
    state = {
        f"{parameters[id(parameter)]}/{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    parts = ranks.world_size if any(isinstance(tensor, DTensor) for tensor in tensors.values()) else 1
    try:
        with ranks.agreeing():
            if ranks.rank < parts:
                _write_part(partial, "module", tensors, ranks)
                _write_part(partial, "optimizer", {**state, _RNG: torch.get_rng_state()}, ranks)
        with ranks.agreeing():
            if ranks.is_first:
                state_json = progress.model_copy(update={"parts": parts}).model_dump_json().encode()
                write_atomically(partial / "state.json", state_json)
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)  # on a full disk the room is wanted
        raise
    with ranks.agreeing():
        if ranks.is_first:
            _commit(partial, path)


def _commit(partial: Path, path: Path) -> None:
    sync_folder(partial)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    sync_folder(path.parent)
    for other in path.parent.glob("step-*"):  # also one that a kill has left half removed
        if other != path:
            shutil.rmtree(other)


def load_checkpoint(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE
) -> TrainingState:
    """Restore the last checkpoint; how far the training was, or its start where there is none.

    All ranks must call it, and take the one that the first of them finds.
    """
    found = _checkpoints(folder)
    name = ranks.from_first(found[-1].name if found else None)
    if name is None:
        return TrainingState()
    path = folder / name
    try:
        state = TrainingState.model_validate_json(read_file(path / "state.json"))
        own = _own_tensors(module)
        with _opened(path, "module", state.parts) as tensors:
            if tensors.names != own.keys():
                raise ValueError("its tensors are not those of the model")  # noqa: TRY301 - one message for all
            with torch.no_grad():
                for name, tensor in own.items():
                    _overwrite(tensor, tensors.rows(name, *_rows(tensor, ranks)), name)
        with _opened(path, "optimizer", state.parts) as tensors:
            torch.set_rng_state(tensors.rows(_RNG))
            parameters = dict(module.named_parameters())
            for name in sorted(tensors.names - {_RNG}):
                parameter_name, key = name.rsplit("/", 1)
                parameter = parameters[parameter_name]
                if isinstance(parameter, DTensor) and tensors.shape(name) == tuple(parameter.shape):
                    rows = tensors.rows(name, *_rows(parameter, ranks)).to(parameter.device)
                    optimizer.state[parameter][key] = _as_shared(rows, parameter)
                else:  # the number of its steps, too, is whole
                    optimizer.state[parameter][key] = tensors.rows(name).to(parameter.device)
        return state  # noqa: TRY300
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError, CheckpointError) as exc:
        raise CheckpointError(f"{path}: cannot be resumed from ({exc}); delete it to train from the start") from exc


def seconds_kept(folder: Path) -> float:
    """Training seconds that lie in the last checkpoint; zero where there is none that can be read."""
    state = _last_state(folder)
    return state.elapsed_s if state else 0.0


def _last_state(folder: Path) -> TrainingState | None:
    """How far the last checkpoint is; None where there is none that can be read, as who resumes from it says."""
    found = _checkpoints(folder)
    try:
        return TrainingState.model_validate_json(read_file(found[-1] / "state.json")) if found else None
    except (OSError, ValueError):
        return None


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
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _rows(tensor: Tensor, ranks: Ranks) -> tuple[int, int] | tuple[()]:
    """First and end of this rank's rows of a tensor that is shared out; nothing for one that is whole."""
    if not isinstance(tensor, DTensor):
        return ()
    first = first_own_row(tensor, ranks)
    return first, first + len(tensor.to_local())


def _overwrite(tensor: Tensor, value: Tensor, name: str) -> None:
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if own.shape != value.shape:
        raise ValueError(f"{name}: found shape {tuple(value.shape)}, expected {tuple(own.shape)}")
    own.copy_(value)


def _as_shared(own_rows: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        own_rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class _Parts:
    """Tensors in several files, of which a tensor's rows are those of each file in their order."""

    def __init__(self, files: list[Any]) -> None:
        self._files = files
        self.names = set(files[0].keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        shapes = [piece.get_shape() for piece in self._pieces(name)]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def rows(self, name: str, first: int = 0, end: int | None = None) -> Tensor:
        """Rows from `first` to before `end`, or to the last; all that there is of a scalar."""
        pieces = self._pieces(name)
        if len(pieces) == 1 and end is None:
            whole: Tensor = self._files[0].get_tensor(name)
            return whole
        found, start = [], 0
        for piece in pieces:
            rows = piece.get_shape()[0]
            begin, stop = max(first - start, 0), rows if end is None else min(end - start, rows)
            if begin < stop:
                found.append(piece[begin:stop])
            start += rows
        return torch.cat(found) if found else self._files[0].get_tensor(name)[:0]

    def _pieces(self, name: str) -> list[Any]:
        return [file.get_slice(name) for file in self._files if name in file.keys()]  # noqa: SIM118 - no mapping


@contextmanager
def _opened(path: Path, kind: str, parts: int) -> Iterator[_Parts]:
    with ExitStack() as stack:
        names = [path / _part_name(kind, part) for part in range(parts)]
        for name in names:
            require_regular(name)
        yield _Parts([stack.enter_context(safetensors.safe_open(name, "pt")) for name in names])


def _part_name(kind: str, part: int) -> str:
    return f"{kind}-{part}.safetensors" if part else f"{kind}.safetensors"


def _write_part(folder: Path, kind: str, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Own rows of tensors that are shared out, and the others if this is the first part."""
    own = {
        name: tensor.to_local().contiguous() if isinstance(tensor, DTensor) else tensor.contiguous()
        for name, tensor in tensors.items()
        if ranks.is_first or isinstance(tensor, DTensor)
    }
    write_atomically(folder / _part_name(kind, ranks.rank), safetensors.torch.save(own))
