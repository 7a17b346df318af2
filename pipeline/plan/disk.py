"""What a plan needs on disk, and what is free there."""

import shutil
from pathlib import Path

from tristill.pipeline.plan.prediction import Plan
from tristill.pipeline.steps import DumpLogits, all_steps
from tristill.pipeline.workspace import Workspace


def needed_and_free(plan: Plan, workspace: Workspace) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes (needed at most at once, free), by the folder they go to: the run's, and those of caches elsewhere."""
    steps = {step.label: step for step in all_steps(workspace)}
    needed: dict[Path, float] = {}
    scratch: dict[Path, float] = {}
    for stage in plan.stages:
        step = steps[stage.step]
        is_elsewhere = isinstance(step, DumpLogits) and not step.folder.is_relative_to(workspace.run_dir)
        place = step.folder if is_elsewhere else workspace.run_dir
        if not stage.is_done:
            needed[place] = needed.get(place, 0.0) + stage.disk_bytes
            scratch[place] = max(scratch.get(place, 0.0), stage.scratch_bytes)
    free = {str(place): float(shutil.disk_usage(_existing(place)).free) for place in needed}
    return {str(place): num_bytes + scratch[place] for place, num_bytes in needed.items()}, free


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    resolved = folder.resolve()
    return next(path for path in (resolved, *resolved.parents) if path.exists())
