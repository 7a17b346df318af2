"""A step in small, in a process of its own: what it takes to start, and what every unit of its work takes.

    python -m tristill.pipeline.plan.rehearsal REQUEST RESULT

Both are JSON files. The step is built by its own code, twice: cold, as a user would start it, and warm, for its speed.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tristill.cache import CacheError
from tristill.cache.layout import TOKENIZER_NAME
from tristill.pipeline.config import load_config
from tristill.pipeline.errors import PipelineError
from tristill.pipeline.plan.in_small import in_small, training_of
from tristill.pipeline.plan.sizes import windows_positions
from tristill.pipeline.step import Step
from tristill.pipeline.steps import Distill, DumpLogits, Teacher, all_steps
from tristill.pipeline.tokenize_step import Tokenize
from tristill.pipeline.workspace import Workspace
from tristill.stages.errors import StageError
from tristill.stages.resources import peak_rss_mib

_FEWEST_STEPS = 4
NEVER = 2**31


class Request(BaseModel):
    """config: the config of the run. folder: of the rehearsal. step: its label. budget_s: for the warm work, about.

    teacher_s: at most, for a model that shall teach, since its cache changes with its age: it is trained for a third
    of its steps, and to the end if that takes no more than a third of this time.
    steps: of a training whose model is all that is wanted. once: whether only the cache of a dump is.
    """

    model_config = ConfigDict(frozen=True)

    config: Path
    folder: Path
    step: str
    budget_s: Annotated[float, Field(gt=0)]
    teacher_s: float = 0.0
    steps: int | None = None
    once: bool = False


class Rehearsed(BaseModel):
    """What was measured.

    fixed_s: before and after the units of work, of a process that starts. unit_s: of a step of training or a position
    of a dump. evaluated_s: of a position of the evaluation. checkpoint_s, checkpoint_bytes: of saving one. num_units:
    what unit_s is the mean of. steps: of the training. refused_exports: formats that will refuse the student, and why.
    error: what the step says to its user, instead of all else.
    """

    model_config = ConfigDict(frozen=True)

    fixed_s: float = 0.0
    unit_s: float = 0.0
    evaluated_s: float = 0.0
    checkpoint_s: float = 0.0
    checkpoint_bytes: int = 0
    num_units: int = 0
    steps: int = 0
    peak_rss_mib: float = 0.0
    disk_bytes: int = 0
    threads: int = 0
    refused_exports: str | None = None
    error: str | None = None


def rehearse(request: Request) -> Rehearsed:
    """Build the step in its folder of the rehearsal, and measure that."""
    step = _step(request, request.folder)
    if isinstance(step, Tokenize):
        measured = _build_once(step)
    elif isinstance(step, DumpLogits):
        measured = _build_once(step) if request.once else _rehearse_dump(step)
    elif isinstance(step, Teacher) and step.config.teacher.path is not None:
        measured = _build_once(step)
        evaluated_s, positions = _evaluation(step)
        left = {"fixed_s": measured.fixed_s - evaluated_s * positions, "evaluated_s": evaluated_s}
        measured = measured.model_copy(update=left)
    elif request.steps is not None:
        measured = _build_once(_step(request, request.folder, request.steps, request.steps))
    else:
        measured = _rehearse_training(request, step)
    found: dict[str, float | str | None] = {"peak_rss_mib": peak_rss_mib(), "disk_bytes": folder_bytes(step.folder)}
    from tristill.stages.threads import num_threads  # with torch, which not every step loads

    found |= {"threads": num_threads(), "refused_exports": _refused_exports(step)}
    return measured.model_copy(update=found)


def _refused_exports(step: Step) -> str | None:
    from tristill.stages.export.refusal import early_refusals
    from tristill.stages.models.checkpoint import load_model

    if not isinstance(step, Distill) or not step.config.student.quantize.packed_bits:
        return None
    return early_refusals(load_model(step.folder), step.folder / TOKENIZER_NAME)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _step(request: Request, folder: Path, steps: int = 3, log_every: int = 1, checkpoint_every: int = NEVER) -> Step:
    config = in_small(load_config(request.config), steps, log_every, checkpoint_every)
    found = [step for step in all_steps(Workspace(config, folder)) if step.label == request.step]
    return found[0]


def _build_once(step: Step) -> Rehearsed:
    return Rehearsed(fixed_s=_build(step))


def _build(step: Step) -> float:
    """Seconds that the step took, counted as its record of provenance does."""
    step.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    step.build()
    return time.monotonic() - started


def _rehearse_training(request: Request, step: Step) -> Rehearsed:
    """A cold build of three steps, and a warm one of as many as the budget has room for, with a checkpoint at its end.

    Steps are logged as often as in the run, or twice in the rehearsal; those before the second record are left
    out, being slower. A training that the budget has room for is done as it is.
    """
    apart = request.folder.parent / "cold"
    link_all_but([step.folder.relative_to(request.folder)], request.folder, apart)
    cold = _step(request, apart)
    cold_s = _build(cold)
    second_s, third_s = _record_times(cold.folder).values()
    shutil.rmtree(apart)
    configured = training_of(_configured(request))
    assert configured is not None, "a teacher that is given is not trained"
    a_step_s = third_s - second_s
    whole_s = configured.steps * a_step_s
    enough_s = whole_s if whole_s <= request.teacher_s / 3 else whole_s / 3
    to_teach = round(min(request.teacher_s, enough_s) / a_step_s)
    affordable = max(int(request.budget_s / a_step_s), to_teach)
    is_whole = affordable >= configured.steps
    has_checkpoints = configured.steps > configured.checkpoint_every
    if is_whole:
        steps = last = configured.steps
        warm = _configured(request)
    else:
        log_every = max(1, min(configured.log_every, max(_FEWEST_STEPS, affordable) // 2))
        last = max(_FEWEST_STEPS, affordable) // log_every * log_every
        steps = last + 1
        warm = _step(request, request.folder, steps, log_every, last if has_checkpoints else NEVER)
    _build(warm)
    times = _record_times(warm.folder)
    first = min(times, default=last)
    step_s = (times[last] - times[first]) / (last - first) if 1 < first < last else a_step_s
    evaluated_s, positions = _evaluation(warm)
    return Rehearsed(
        fixed_s=max(0.0, cold_s - 3 * step_s - evaluated_s * positions),
        unit_s=step_s,
        evaluated_s=evaluated_s,
        checkpoint_s=max(0.0, times[steps] - times[last] - step_s) if has_checkpoints and not is_whole else 0.0,
        checkpoint_bytes=3 * (warm.folder / "model.safetensors").stat().st_size if has_checkpoints else 0,
        num_units=max(1, last - first),
        steps=steps,
    )


def _configured(request: Request) -> Step:
    """The step with the trainings of the run itself."""
    config = in_small(load_config(request.config), None)
    return next(step for step in all_steps(Workspace(config, request.folder)) if step.label == request.step)


def _record_times(folder: Path) -> dict[int, float]:
    """Seconds from the start of a training to each of its records but that of step 1, by step.

    The speed in a record is that of the steps before it.
    """
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="ascii").splitlines()]
    return {
        record["step"]: record["positions"] * (1 - 1 / record["step"]) / record["positions_per_s"]
        for record in records
        if record["step"] > 1
    }


def link_all_but(own: Collection[Path], run_dir: Path, twin: Path) -> None:
    """A run folder that shares everything with another but the folders of its `own`, relative to it."""
    shared = ("students", "caches")
    for path in (*run_dir.iterdir(), *(path for name in shared for path in run_dir.glob(f"{name}/*"))):
        relative = path.relative_to(run_dir)
        if relative not in own and path.name not in shared:
            place = twin / relative
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())


def _evaluation(step: Step) -> tuple[float, int]:
    """(seconds per position of the evaluation at the end of a training, positions of the rehearsal)."""
    from tristill.pipeline.evaluation import evaluate_models
    from tristill.stages.evaluate.evaluate import evaluate
    from tristill.stages.models.checkpoint import load_model, pick_device
    from tristill.stages.targets.online import OnlineSource

    workspace = step.workspace
    if isinstance(step, Teacher):
        training = step.config.teacher.training
        device = pick_device(training.device if training else step.config.cache.device)
        source = OnlineSource(workspace.data, device)
        model = load_model(step.folder).to(device)
        started = time.monotonic()
        evaluate(model, source, step.config.evaluate, "teacher")
        positions = source.num_windows("validation") * source.context_length
    else:
        if isinstance(step, Distill) and step.targets() == "online":  # it forwards its teacher here too
            apart = workspace.run_dir.parent / "uncached"
            link_all_but([workspace.cache.relative_to(workspace.run_dir)], workspace.run_dir, apart)
            workspace = replace(workspace, run_dir=apart)
        started = time.monotonic()
        evaluate_models(workspace, (step.folder.name,), force=True)
        positions = _validation_positions(workspace)
    seconds = time.monotonic() - started
    if workspace is not step.workspace:
        shutil.rmtree(workspace.run_dir)
    return seconds / positions, positions


def _validation_positions(workspace: Workspace) -> int:
    """Positions that a student is evaluated on: those of the cache, if there is one."""
    from tristill.cache.manifest import cache_fingerprint, load_manifest
    from tristill.stages.data.tokenized import split_windows

    if cache_fingerprint(workspace.cache) is not None:
        return windows_positions(load_manifest(workspace.cache).spec)["validation"]
    windows = split_windows(workspace.data, "validation")
    return windows.num_windows * windows.context_length


def _rehearse_dump(step: DumpLogits) -> Rehearsed:
    """The whole of a small cache, with its calibration; then its shards again, with the tables that are there."""
    from tristill.cache.manifest import load_manifest

    whole_s = _build(step)
    manifest = load_manifest(step.folder)
    kept = step.folder.with_name(f"{step.folder.name}-kept")
    shutil.copytree(step.folder, kept)
    for shard in manifest.shards:
        (step.folder / shard.name).unlink()
    shards_s = _build(step)
    shutil.rmtree(step.folder)
    kept.rename(step.folder)
    positions = sum(windows_positions(manifest.spec).values())
    return Rehearsed(fixed_s=max(0.0, whole_s - shards_s), unit_s=shards_s / positions, num_units=positions)


def main() -> None:
    """Rehearse what the request says; a step's own refusal goes into the result."""
    request = Request.model_validate_json(Path(sys.argv[1]).read_bytes())
    try:
        result = rehearse(request)
    except (PipelineError, StageError, CacheError) as exc:
        result = Rehearsed(error=str(exc))
    except OSError as exc:
        result = Rehearsed(error=f"{exc.filename or 'system'}: {exc.strerror or exc}")
    Path(sys.argv[2]).write_text(result.model_dump_json(), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # threads of libraries may take their time to end


if __name__ == "__main__":
    main()
