"""Trainings that several processes do together: run by torchrun as a script, or alone by a call."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from small_training import CPU, SHAPE, dump_config, places
from torch import nn

from conftest import ENVIRONMENT, ROOT
from tristill.cache import SplitName
from tristill.stages.distill.choose import choose_source
from tristill.stages.distill.config import DistillConfig, StudentConfig
from tristill.stages.distill.distill import distill
from tristill.stages.errors import StageError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.ranks import current_ranks, joined_ranks
from tristill.stages.targets.source import Epoch, Signals, TargetBatch, TargetSource
from tristill.stages.teacher.config import TeacherConfig
from tristill.stages.teacher.train import train_teacher
from tristill.stages.training.parallel import require_alike


@dataclass(frozen=True)
class Job:
    """A training in `folder`. cache: None trains the teacher of `run`, "" a student online.

    fails_after: batches after which every process fails. stopped: (rank, batch) of one that gets a SIGTERM then.
    spoiled: nothing is trained: the ranks compare a module of which one weight is another on that rank.
    """

    folder: str
    run: str
    cache: str | None
    config: dict[str, Any]
    student: dict[str, Any] = field(default_factory=dict)
    dump: dict[str, Any] = field(default_factory=dict)
    fails_after: int | None = None
    stopped: tuple[int, int] | None = None
    spoiled: int | None = None


class Interrupted:
    """A source of which something happens in the midst of its training batches."""

    def __init__(self, source: TargetSource, job: Job) -> None:
        self._source, self._job = source, job

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def batches(self, split: SplitName, batch_windows: int, signals: Signals, epoch: Epoch) -> Iterator[TargetBatch]:
        for number, batch in enumerate(self._source.batches(split, batch_windows, signals, epoch)):
            if split == "train" and number == self._job.fails_after:
                raise RuntimeError("pulled the plug")
            if split == "train" and self._job.stopped == (current_ranks().rank, number):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def do(job: Job) -> str:
    """Train, and say how it ended: "" is well."""
    run, folder = Path(job.run), Path(job.folder)
    try:
        if job.spoiled is not None:
            compare(job.spoiled)
        elif job.cache is None:
            train_teacher(TeacherConfig.model_validate(job.config), run / "data", folder, EvaluateConfig())
        else:
            config, student = DistillConfig.model_validate(job.config), StudentConfig.model_validate(job.student)
            source = choose_source(
                config, dump_config(**job.dump), SHAPE.layers, places(run, Path(job.cache or run / "no")), CPU
            )
            if (job.fails_after, job.stopped) != (None, None):
                source = Interrupted(source, job)  # type: ignore[assignment]
            shape = student.shape or SHAPE
            distill(
                config, student, shape, source, CPU, folder, run / "teacher", EvaluateConfig(batch_windows=7), {}, SHAPE
            )
    except (RuntimeError, KeyboardInterrupt, StageError) as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def compare(spoiled: int) -> None:
    """The last bit of one weight differs."""
    module = nn.Sequential(nn.Linear(2, 2), nn.RMSNorm(2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
        if current_ranks().rank == spoiled:
            module[0].weight[1, 0] += 2**-23
    require_alike(module, current_ranks(), "here")


def do_together(world_size: int, jobs: dict[str, Job], folder: Path, timeout_s: float = 200) -> dict[str, list[str]]:
    """How each job ended on every rank."""
    folder.mkdir(exist_ok=True)
    listed = folder / f"jobs-{world_size}.json"
    listed.write_text(json.dumps({name: asdict(job) for name, job in jobs.items()}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    done = subprocess.run(
        [*launch, str(Path(__file__)), str(listed)],
        check=False,
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr
    ends: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return ends


def main(listed: Path) -> None:
    """All jobs of a list, one after another."""
    torch.set_num_threads(1)
    jobs = {name: Job(**job) for name, job in json.loads(listed.read_text()).items()}
    jobs = {name: Job(**{**asdict(job), "stopped": job.stopped and tuple(job.stopped)}) for name, job in jobs.items()}
    with joined_ranks() as ranks:
        ends = {name: ranks.gathered(do(job)) for name, job in jobs.items()}
        if ranks.is_first:
            print(json.dumps(ends), flush=True)
        ranks.wait_for_all()
        sys.stderr.flush()
        os._exit(0)  # threads of gloo outlive groups that meshes hold, and may abort an interpreter that is being ended


if __name__ == "__main__":
    main(Path(sys.argv[1]))
