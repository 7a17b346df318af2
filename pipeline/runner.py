"""Runs steps: decides what is up to date, partly done or stale, and builds what is needed."""

import glob
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tristill.cache.atomic import write_atomically
from tristill.pipeline.errors import BusyError, ChildError, MissingInputError, MovedError, StaleError
from tristill.pipeline.provenance import (
    PROVENANCE_NAME,
    Provenance,
    differences,
    held_to_read,
    held_with_others,
    locked,
    new_provenance,
    write_provenance,
)
from tristill.pipeline.reading import Reading, reading
from tristill.pipeline.step import COMMANDS_ON_RANKS, NOT_HERE, Step
from tristill.pipeline.steps import all_steps
from tristill.pipeline.workspace import RUN_CONFIG_NAME, Workspace
from tristill.stages.progress import say
from tristill.stages.ranks import Ranks, joined_ranks
from tristill.stages.resources import machine, peak_rss_mib

_INTERRUPTED = 130


def execute(step: Step, *, force: bool = False) -> None:
    """Build one step's artefact: skip it if up to date, go on if partly done, refuse if stale.

    In this process, or in all that torchrun started: then the first rank decides and keeps the records, all build, and
    what one refuses is told once.
    """
    with joined_ranks() as ranks, ExitStack() as held:
        with ranks.agreeing():
            pass  # all have come this far
        record: _Record | None = None
        with ranks.agreeing():
            if ranks.is_first:
                record = _begun(step, held, force=force, ranks=ranks)
        if not ranks.from_first(record is not None):
            return
        with ranks.agreeing():
            if not ranks.is_first:
                held.enter_context(held_with_others(step.folder))
        fingerprint = _built(step, record)
        with ranks.agreeing():  # what is in the folder is whole on every machine
            if record is not None:
                record.finish(fingerprint)


def _begun(step: Step, held: ExitStack, *, force: bool, ranks: Ranks) -> "_Record | None":
    """The record of a build that begins now, in a folder that is held; None if there is nothing to build."""
    if force:
        step.refuse_force()
    elif _is_up_to_date(step):
        return None
    step.refuse_outside()
    inputs = held.enter_context(reading(step.reads(), step.folder))
    _require_inputs(step)
    trace = _Trace(step)
    hold = held.enter_context(locked(step.folder))
    held.push(trace)  # removes folders while they are locked
    if force:
        _clear(step)
    refuse_if_stale(step)
    if step.is_complete():
        say(f"{step.label}: up to date in {step.folder}")  # by now
        return None
    record = _Record(step, inputs, trace)
    if ranks.are_many:
        hold.share()
    return record


def _is_up_to_date(step: Step) -> bool:
    """Whether there is nothing to build, which is then said; others may read the artefact meanwhile."""
    with held_to_read(step.folder):
        if not step.is_complete():
            return False
        refuse_if_stale(step)
    if left := _found(step, step.scratch):  # by a kill
        with suppress(BusyError, OSError), locked(step.folder):
            _remove(left)
    say(f"{step.label}: up to date in {step.folder}")
    return True


def build_held(step: Step, kept_s: float = 0.0) -> None:
    """Build a step's artefact in its folder, which this process has locked; does nothing if it is up to date.

    kept_s: seconds that lie in what is gone on from, whatever the record knows of them.
    """
    refuse_if_stale(step)
    if step.is_complete():
        _remove(_found(step, step.scratch))
        return
    step.refuse_outside()
    with reading(step.reads(), step.folder) as inputs, _Trace(step) as trace:
        record = _Record(step, inputs, trace, kept_s)
        record.finish(_built(step, record))


def _built(step: Step, record: "_Record | None") -> str:
    """The fingerprint of the artefact that is there now; of one that failed the record says how far it came."""
    try:
        return step.build()
    except BaseException:
        if record is not None:
            record.stop()
        raise


class _Trace:
    """A step's folder, made if it is not there, and the run's config, as they were: restored unless a build kept more.

    A context manager, for the time in which the folder is locked.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._config = step.workspace.run_dir / RUN_CONFIG_NAME
        self._config_before = self._content()
        self._written: bytes | None = None
        self._made = list(takewhile(lambda folder: not folder.exists(), (step.folder, *step.folder.parents)))
        step.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Remove folders that were made for nothing; what others have put into them meanwhile stays."""
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def save_config(self) -> None:
        """Keep the config with the run."""
        self._step.save_config()
        self._written = self._content()

    def restore_config(self) -> None:
        """Put back the config that was there, unless another process has replaced it or works beside it."""
        is_ours = self._content() == self._written != self._config_before
        if is_ours and self._config_before is not None:
            write_atomically(self._config, self._config_before)
        elif is_ours and not any(path.is_file() for path in self._config.parent.rglob("*") if path != self._config):
            self._config.unlink()

    def _content(self) -> bytes | None:
        return self._config.read_bytes() if self._config.is_file() else None


class _Record:
    """The record of provenance of a build, from its beginning to its end."""

    def __init__(self, step: Step, inputs: Reading, trace: _Trace, kept_s: float = 0.0) -> None:
        self._step, self._inputs, self._trace = step, inputs, trace
        self._started_s = time.monotonic()
        recorded = step.provenance()
        goes_on = recorded is not None and bool(_found(step, step.resumable))
        told_s, self._is_known = _seconds_of(recorded) if recorded is not None and goes_on else (0.0, True)
        self._earlier_s = max(told_s, kept_s)
        is_begun_anew = recorded is not None and recorded.status == "building" and not goes_on
        self._is_new = not step.is_copy and (recorded is None or is_begun_anew)
        if is_begun_anew:
            _remove(_found(step, step.owned))  # it may be of other settings, and is not to be taken for this build's
        self._provenance = new_provenance(step.label, step.settings(), step.inputs())
        inputs.refuse_tampered(self._provenance.inputs)
        trace.save_config()
        # As it is to be read if this process is killed: its own seconds are then unknown.
        self._write({"earlier_s": self._earlier_s, "is_resumed": True} if goes_on else {})

    @property
    def _elapsed_s(self) -> float:
        return self._earlier_s + time.monotonic() - self._started_s

    def stop(self) -> None:
        """The build was interrupted, or has failed; if it has made nothing yet, nothing is left of it."""
        with suppress(OSError):  # of a full disk, which is told already
            if self._is_new and not any(map(_has_content, _found(self._step, self._step.owned))):
                self._discard()
            else:
                self._write({"earlier_s": self._elapsed_s, "is_resumed": not self._is_known})

    def finish(self, fingerprint: str) -> None:
        """The artefact is there. Raises MovedError if it was not made of what the record says."""
        read = {name: known for name, known in self._provenance.inputs.items() if not known.startswith(NOT_HERE)}
        try:
            self._inputs.refuse_moved(read)
        except MovedError:
            self._discard()
            raise
        brought = {name: known for name, known in self._step.inputs().items() if name in self._step.fetched}
        self._write(
            {
                "status": "complete",
                "fingerprint": fingerprint,
                "inputs": self._provenance.inputs | brought | read,
                "elapsed_s": self._elapsed_s,
                "peak_rss_mib": peak_rss_mib(),
                "is_resumed": not self._is_known,
                "machine": machine(),  # with the accelerator, which is known once torch is loaded
                "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        _remove(_found(self._step, self._step.scratch))  # not before: until then a kill loses nothing

    def _discard(self) -> None:
        _remove(_found(self._step, (*self._step.owned, PROVENANCE_NAME)))
        self._trace.restore_config()

    def _write(self, update: dict[str, Any]) -> None:
        write_provenance(self._step.folder, self._provenance.model_copy(update=update))


def _seconds_of(recorded: Provenance) -> tuple[float, bool]:
    """Seconds that earlier processes have told of, and whether that is all of them."""
    told_s = recorded.elapsed_s if recorded.status == "complete" else recorded.earlier_s
    return told_s or 0.0, told_s is not None and not recorded.is_resumed


def _require_inputs(step: Step) -> None:
    for needed in step.requires.values():
        _require_inputs(needed)
        refuse_if_stale(needed)
        if not needed.is_complete():
            raise MissingInputError(
                f"{step.label} needs {needed.folder}, which is missing or unfinished; run `tristill {needed.label}` "
                f"first, or `tristill run --until {step.command}` for all"
            )


def refuse_if_stale(step: Step) -> None:
    """Raise StaleError if the folder holds an artefact of other settings or inputs, or files that are not ours."""
    recorded = step.provenance()
    if recorded is None:
        if step.is_copy or step.is_complete():
            return  # a cache from elsewhere, without its record
        begun = f".{PROVENANCE_NAME}."  # all that is left by a kill before the first record
        if foreign := [path for path in _found(step, step.owned) if not path.name.startswith(begun)]:
            raise StaleError(
                f"{step.folder}: holds {foreign[0].name} but no {PROVENANCE_NAME}, so it was not made by "
                f"`tristill {step.command}`; use another folder, or remove it yourself"
            )
        return
    if recorded.step.split()[0] != step.command:
        raise StaleError(
            f"{step.folder}: was made by `tristill {recorded.step}`, not by `tristill {step.label}`; use another folder"
        )
    if recorded.status == "building" and not _found(step, step.resumable):
        return  # refused or stopped before there was anything to go on from
    if changed := differences(recorded, step.settings(), step.inputs()):
        raise StaleError(
            f"{step.folder}: was made with other settings or inputs:\n"
            + "\n".join(f"  {line}" for line in changed)
            + f"\nset them back, use another --run-dir, or rebuild it with `tristill {step.label} --force`"
        )


def plan(workspace: Workspace, until: str) -> list[Step]:
    """The steps to run, in order, to have all artefacts of `until`; refuses if any artefact on the way is stale.

    In a chain these are the artefacts of its last link; those of the stages before it are made if they are needed.
    """
    steps = all_steps(workspace)
    last = max(i for i, step in enumerate(steps) if step.command == until)
    chain = steps[: last + 1]
    for step in chain:
        refuse_if_stale(step)
    wanted: set[Path] = set()

    def want(step: Step) -> None:
        if step.folder not in wanted and not step.is_complete():
            wanted.add(step.folder)
            for needed in step.needs.values():
                want(needed)

    for step in chain:
        if step.command == until and step.workspace.name not in workspace.config.stages:
            want(step)
    return [step for step in chain if step.folder in wanted]


def run_steps(steps: Sequence[Step], arguments: Sequence[str], ranks: int = 1) -> None:
    """Run each step in a process of its own, so that none holds memory of another's, and each could run alone.

    ranks: processes that work together on each of the heavy steps.
    """
    for step in steps:
        command = [*step.label.split(), *arguments]
        say(f"$ tristill {' '.join(command)}")
        are_many = ranks > 1 and step.command in COMMANDS_ON_RANKS
        program = [*(["tristill.stages.launcher", str(ranks)] if are_many else []), "tristill.pipeline"]
        # What a step prints is news here; the result of a run is printed by its caller. A launcher of ranks has a group
        # of its own, so that it sees one signal, from here, where a terminal sends one too.
        child = subprocess.Popen(  # noqa: S603 - ours
            [sys.executable, "-m", *program, *command], stdout=2, process_group=0 if are_many else None
        )
        with _stopped_with_us(child) if are_many else nullcontext():
            code = _wait(child)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise ChildError(f"{step.label} did not finish", exit_code=code if code > 0 else 1)


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The exit code. An interrupt is passed on once; the child then saves its state, ends, and so do we."""
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise


@contextmanager
def _stopped_with_us(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-Z stops the ranks too, which the terminal does not reach in their own groups, and `fg` has them go on."""

    def stop(*_: object) -> None:
        ranks = _with_descendants(child.pid)
        for signum, pids in ((signal.SIGSTOP, ranks), (signal.SIGSTOP, [os.getpid()]), (signal.SIGCONT, ranks)):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signum)

    before = signal.getsignal(signal.SIGTSTP)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


def _with_descendants(pid: int) -> list[int]:
    """A process and all that it has started, as far as the system tells."""
    try:
        children = [
            int(name) for path in Path(f"/proc/{pid}/task").glob("*/children") for name in path.read_text().split()
        ]
    except OSError:  # it has ended
        children = []
    return [pid, *(found for child in children for found in _with_descendants(child))]


def _clear(step: Step) -> None:
    """Remove what an earlier build of this step left; only in a folder that carries its record, readable or not."""
    try:
        recorded = step.provenance()
    except StaleError:
        pass
    else:
        if recorded is None or recorded.step.split()[0] != step.command:
            return
    _remove(_found(step, (*step.owned, PROVENANCE_NAME)))


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0


def _found(step: Step, patterns: tuple[str, ...]) -> list[Path]:
    folder = Path(glob.escape(str(step.folder)))
    return [Path(name) for pattern in patterns for name in sorted(glob.glob(str(folder / pattern)))]  # noqa: PTH207
