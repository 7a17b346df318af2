"""What an artefact is, what it was made from and how: `provenance.json` in its folder.

The file is written when work starts (`building`) and again when it ends (`complete`): what is not complete is never
taken for finished, and what was made with other settings or inputs is told apart.
"""

import fcntl
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from tristill.cache.atomic import write_atomically
from tristill.cache.layout import DEFAULT_SHARD_POSITIONS
from tristill.cache.regular_file import read_file
from tristill.cache.secrets import credentials_in, masked
from tristill.pipeline.errors import BusyError, StaleError
from tristill.stages.resources import machine

PROVENANCE_NAME = "provenance.json"
_PACKAGES = ("tristill", "torch", "numpy", "h5py", "zstandard", "tokenizers", "datasets")


# What records mean that were written before these settings were there. See also Section.newer.
_SETTINGS_SINCE: dict[str, Any] = {
    "cache.hidden.output": "residual",
    "distill.windows.shard_positions": DEFAULT_SHARD_POSITIONS,
}


class Provenance(BaseModel):
    """`settings` are those that affect numbers; `inputs` and `fingerprint` are hashes of content.

    elapsed_s: seconds of all processes that worked on it, once it is complete. earlier_s: while it is not, what those
    took that have ended or were interrupted; None if no process has said so. is_resumed: it went on from where a
    process was killed, whose seconds nobody knows, so that elapsed_s is the least that it took. machine: processor,
    cores and accelerator of the last process. commit: of tristill, where it runs from a checkout. finished_at: in UTC.
    """

    model_config = ConfigDict(frozen=True)

    step: str
    status: Literal["building", "complete"]
    fingerprint: str | None = None
    inputs: dict[str, str]
    settings: dict[str, Any]
    command: Annotated[str, AfterValidator(masked)]
    versions: dict[str, str]
    elapsed_s: float | None = None
    earlier_s: float | None = None
    is_resumed: bool = False
    peak_rss_mib: float | None = None
    machine: dict[str, str] = {}
    commit: str | None = None
    finished_at: str | None = None


def new_provenance(step: str, settings: dict[str, Any], inputs: dict[str, str]) -> Provenance:
    """The record of work that starts now in this process."""
    versions = {"python": sys.version.split()[0]} | {package: version(package) for package in _PACKAGES}
    command = shlex.join(["tristill", *sys.argv[1:]])
    return Provenance(
        step=step,
        status="building",
        inputs=inputs,
        settings=settings,
        command=command,
        versions=versions,
        machine=machine(),
        commit=own_commit(),
    )


def own_commit() -> str | None:
    """The commit of the checkout that this runs from, with `-dirty` if it was changed; None where there is none."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - ours
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def read_provenance(folder: Path) -> Provenance | None:
    """The record in a folder, or None where there is none."""
    path = folder / PROVENANCE_NAME
    try:
        return Provenance.model_validate_json(read_file(path))
    except FileNotFoundError:
        return None
    except ValidationError as exc:
        raise StaleError(
            f"{path}: cannot be read as a record of provenance; use another run folder, or --force to build anew"
        ) from exc


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Replace the record."""
    write_atomically(folder / PROVENANCE_NAME, (provenance.model_dump_json(indent=2) + "\n").encode())


def differences(recorded: Provenance, settings: dict[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """What changed since, one line each. An input that is not known now says nothing."""
    old, new = _SETTINGS_SINCE | flat(recorded.settings), _SETTINGS_SINCE | flat(settings)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = [f"{key}: was {_shown(key, old)}, is {_shown(key, new)}" for key in changed]
    for name, fingerprint in recorded.inputs.items():
        if inputs.get(name, fingerprint) != fingerprint:
            lines.append(f"input {name}: was {fingerprint[:12]}, is {inputs[name][:12]}")
    return lines


def _shown(key: str, settings: Mapping[str, Any]) -> str:
    """A setting as in Python; records that are older than this rule may hold a credential."""
    return "..." if credentials_in({key.rsplit(".", maxsplit=1)[-1]: settings.get(key)}) else repr(settings.get(key))


@dataclass(frozen=True)
class Hold:
    """A folder that this process holds."""

    folder: Path
    descriptor: int

    def share(self) -> None:
        """Let other ranks hold the folder too (`held_with_others`); still nobody can lock it who works on his own."""
        with _told_if_busy(self.folder):
            fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[Hold]:
    """Hold the folder for this process; freed by the system when the process ends, however it ends.

    Raises BusyError if another holds or reads it, unless it is to `wait` for that one.
    """
    with _opened(folder) as descriptor:
        with _told_if_busy(folder):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if not _is_still(folder, descriptor):
            raise BusyError(f"{folder}: another process has just removed it; run the same command again")
        yield Hold(folder, descriptor)


@contextmanager
def held_with_others(folder: Path) -> Iterator[None]:
    """Hold a folder that the first rank shares: it stays held until the last of them has ended."""
    with _opened(folder) as descriptor:
        Hold(folder, descriptor).share()
        yield


@contextmanager
def held_to_read(folder: Path) -> Iterator[None]:
    """Keep others from changing a folder while this process reads it; any number may read it at once.

    Raises BusyError if another process is changing it. Where folders cannot be locked, nothing is held.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        with suppress(OSError), _told_if_busy(folder):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_still(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def _told_if_busy(folder: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError as exc:
        raise BusyError(
            f"{folder}: another process is working on it or reads it; wait for it, or use another --run-dir"
        ) from exc
    except OSError as exc:
        raise OSError(exc.errno, f"this file system has no locks of folders ({exc.strerror})", str(folder)) from exc


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested tables by their dotted keys."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, part in value.items() for k, v in flat(part, f"{path}.{key}".lstrip(".")).items()}
