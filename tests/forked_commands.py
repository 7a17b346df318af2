"""Real runs of the command line in 0.1 s each: processes forked from one that has loaded torch and all the rest.

`Commands` starts the server, which is this file run as a program. A run can be killed with SIGKILL, with all processes
that it started, after a time or right before the n-th change that it makes to the file system or to a data base. Such
changes are counted by an audit hook: files opened for writing, renamed, linked, removed, folders made and removed; and
by a profile hook for SQLite: statements and commits, before and after.
"""

import importlib
import json
import mmap
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_LOADED = (
    *("datasets", "gguf", "h5py", "optuna", "torch._dynamo", "accelerate", "xllamacpp"),
    *("transformers.models.llama.modeling_llama", "transformers.models.bitnet.modeling_bitnet"),
    *(
        "transformers.integrations.bitnet",
        "tristill.pipeline.cli",
        "tristill.pipeline.exporting",
        "tristill.pipeline.sweep.run",
    ),
    *(
        "tristill.stages.data.tokenize",
        "tristill.stages.dump.dump",
        "tristill.stages.distill.choose",
        "tristill.stages.distill.distill",
    ),
    *(
        "tristill.stages.teacher.given",
        "tristill.stages.teacher.train",
        "tristill.pipeline.sweep_command",
        "tristill.pipeline.sweep.records",
    ),
    *("tristill.pipeline.sweep.ledger", "sqlalchemy.dialects.sqlite", "optuna.storages._rdb.storage"),
)
_FAILED = 99


@dataclass(frozen=True)
class Request:
    """One run. setup: Python that the process runs first, as a `sitecustomize` would be.

    changes_in: the folder whose changes are counted; None: they are not, nor is anything else watched.
    """

    arguments: list[str]
    output: str
    cwd: str
    changes_in: str | None = None
    kill_before_change: int | None = None
    kill_after_s: float | None = None
    counts_sql: bool = False
    setup: str = ""


@dataclass(frozen=True)
class Ended:
    """How a run ended. changes: how many it had begun; code: negative for a signal."""

    code: int
    changes: int
    elapsed_s: float
    stdout: str
    stderr: str

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Commands:
    """A server of runs, as a context manager."""

    def __init__(self, folder: Path, *, environment: dict[str, str], cwd: Path, launcher: tuple[str, ...] = ()) -> None:
        """`folder` takes what runs print; launcher: a command in front of the server's, such as `unshare -m`."""
        self._folder, self._cwd = folder, cwd
        self._server = subprocess.Popen(
            [*launcher, sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=cwd,
        )

    def run(self, *arguments: str, run_dir: Path, **how: Any) -> Ended:
        """One command in a run folder, whose changes are counted."""
        return self.end(*arguments, "--run-dir", str(run_dir), changes_in=str(run_dir), **how)

    def end(self, *arguments: str, cwd: Path | None = None, **how: Any) -> Ended:
        """Any command."""
        request = Request(list(arguments), str(self._folder / "out"), str(cwd or self._cwd), **how)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asdict(request)) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server of runs has ended"
        texts = {key: Path(f"{request.output}.{key}").read_text(encoding="utf-8") for key in ("stdout", "stderr")}
        ended = Ended(**json.loads(answer), **texts)
        assert "Traceback" not in ended.stderr, ended.stderr
        return ended

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.communicate()


def _serve() -> None:
    for name in _LOADED:
        with suppress(ImportError):  # of an extra
            importlib.import_module(name)
    counter = mmap.mmap(-1, 8)  # shared with the children, so that it outlives them
    for line in sys.stdin:
        request = Request(**json.loads(line))
        counter[:] = (0).to_bytes(8, "little")
        started_s = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_the_command(request, counter)
        status = _wait(child, None if request.kill_after_s is None else started_s + request.kill_after_s)
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "changes": int.from_bytes(counter[:], "little"),
            "elapsed_s": time.monotonic() - started_s,
        }
        print(json.dumps(answer), flush=True)


def _wait(child: int, kill_at_s: float | None) -> int:
    """The status of a process, and the end of all that it started once it is gone."""
    descriptor = os.pidfd_open(child)
    select.select([descriptor], [], [], None if kill_at_s is None else max(0.0, kill_at_s - time.monotonic()))
    os.close(descriptor)
    _kill_group(child)
    _, status = os.waitpid(child, 0)
    return status


def _kill_group(child: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _be_the_command(request: Request, counter: mmap.mmap) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, key in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{request.output}.{key}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    sys.argv = ["tristill", *request.arguments]
    code = _FAILED
    try:
        exec(request.setup, {})  # noqa: S102 - the test's own
        os.chdir(request.cwd)
        if request.changes_in is not None:
            _count_changes(request.changes_in, request, counter)
        from tristill.pipeline.__main__ import main

        main()
    except SystemExit as exc:
        code = int(exc.code or 0)
    except BaseException:  # noqa: BLE001 - whatever it was, it is shown
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_changes(prefix: str, request: Request, counter: mmap.mmap) -> None:
    def change() -> None:
        number = int.from_bytes(counter[:], "little") + 1
        if number == request.kill_before_change:
            os.killpg(os.getpid(), signal.SIGKILL)
        counter[:] = number.to_bytes(8, "little")

    def is_in_run(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(prefix)

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR) and is_in_run(path):
                change()
        elif event in _CHANGES:
            path, *rest = arguments
            is_below_a_folder = bool(rest) and isinstance(rest[-1], int) and rest[-1] >= 0  # as rmtree does
            if is_in_run(path) or is_below_a_folder:
                change()

    sys.addaudithook(on_event)
    if request.counts_sql:

        def on_call(frame: Any, event: str, called: Any) -> None:
            is_call = event in {"c_call", "c_return"} and called.__name__ in {"execute", "commit"}
            if is_call and type(called.__self__).__module__ == "sqlite3":
                change()

        sys.setprofile(on_call)


def copy_of(folder: Path, to: Path, *names: str) -> Path:
    """A run folder with these parts of another one."""
    to.mkdir(parents=True)
    for name in names:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, to / name)
        elif (folder / name).exists():
            shutil.copy2(folder / name, to / name)
    return to


if __name__ == "__main__":
    _serve()
