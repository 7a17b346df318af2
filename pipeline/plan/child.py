"""Runs a rehearsal in a process of its own, so that its memory is its own."""

import signal
import subprocess
import sys
from pathlib import Path

from tristill.pipeline.plan.errors import PlanError
from tristill.pipeline.plan.rehearsal import Rehearsed, Request


def rehearsed(request: Request, scratch: Path) -> Rehearsed:
    """What was measured. Raises PlanError if the step refuses or its process dies; it is ended with this one's."""
    asked, answer, log = (scratch / name for name in ("request.json", "result.json", "log.txt"))
    asked.write_text(request.model_dump_json(), encoding="utf-8")
    answer.unlink(missing_ok=True)
    with log.open("wb") as lines:
        command = [sys.executable, "-m", "tristill.pipeline.plan.rehearsal", str(asked), str(answer)]
        child = subprocess.Popen(command, stdout=lines, stderr=lines)  # noqa: S603 - ours
        try:
            code = child.wait()
        finally:
            if child.poll() is None:  # nothing that it could save is worth its time
                child.kill()
                child.wait()
    if code or not answer.is_file():
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["nothing"]
        short = "; memory may have run out" if code == -signal.SIGKILL else ""
        raise PlanError(f"{request.step}: its rehearsal ended with {how}{short}; the last it said: {said[0]}")
    result = Rehearsed.model_validate_json(answer.read_bytes())
    if result.error is not None:
        raise PlanError(f"{request.step}: cannot be planned, since its rehearsal was refused: {result.error}")
    return result
