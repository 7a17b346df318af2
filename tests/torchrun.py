"""Commands on several gloo processes of this machine, started by torchrun as a user does."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from conftest import ENVIRONMENT, ROOT, Outcome


def command(ranks: int, *arguments: str, program: tuple[str, ...] = ("-m", "tristill.pipeline")) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launch, *program, *arguments]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def outcome(arguments: list[str], timeout_s: float = 200) -> Outcome:
    """Of a command that must not hang."""
    process = start(arguments)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        for pid in [*ranks_of(process).values(), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        raise
    return Outcome(process.returncode, stdout, stderr)


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """The process id of each rank that the launcher, or a child of it, has started by now."""
    found = {}
    waiting = [process.pid]
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):  # it has ended
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            for line in environment:
                if line.startswith(b"RANK="):
                    found[int(line.removeprefix(b"RANK="))] = pid
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found
