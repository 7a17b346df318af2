"""Evaluates checkpoints of a run, or any other model folders, on the run's validation split."""

import json
from pathlib import Path
from typing import Any

from cache import open_cache
from cache.atomic import write_atomically
from cache.layout import MANIFEST_NAME, TOKENIZER_NAME
from pipeline.errors import MissingInputError
from pipeline.results import run_rows
from pipeline.workspace import Workspace
from stages.data.tokenizer_gate import require_same_tokenizer
from stages.distill.caches import open_caches
from stages.distill.config import DistillConfig
from stages.distill.distill import CO_TEACHER
from stages.evaluate.evaluate import evaluate
from stages.models.folder import CONFIG_NAME, load_model, pick_device
from stages.targets.online import OnlineSource
from stages.targets.source import TargetSource


def evaluate_models(workspace: Workspace, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Held-out metrics per model; all finished models of the run if none is named. Writes evaluation.json.

    Each student is judged by its own teacher, everything else by that of the last link. Teacher metrics come from the
    teacher that moved with the student, if there is one in its folder; else from the validation targets of the link's
    cache, or caches, or from the teacher itself where there is no cache.
    """
    folders = {name: workspace.model_folder(name) for name in names or [row.name for row in run_rows(workspace)]}
    if not folders:
        raise MissingInputError(f"{workspace.run_dir}: found no trained model; run `tristill run --until distill`")
    device = pick_device(workspace.config.distill.training.device)
    sources: dict[tuple[object, ...], TargetSource] = {}
    metrics = {}
    for name, folder in folders.items():
        link = workspace.link(workspace.config.link_names[0] if name == "teacher" else name)
        distill = link.config.for_student(link.name).distill
        moved = folder / CO_TEACHER
        if (moved / CONFIG_NAME).is_file():
            source: TargetSource = _online(link, moved)
        else:
            key = (link.cache, distill.caches, distill.shares, distill.tail)
            if key not in sources:
                sources[key] = _source(link, distill)
            source = sources[key]
        model = load_model(folder).to(device)
        require_same_tokenizer(
            folder / TOKENIZER_NAME, source.tokenizer_path, name, "evaluate it with the run that it is of, by --run-dir"
        )
        evaluation = workspace.config.for_student(name).evaluate
        metrics[name] = evaluate(model, source, evaluation, name).model_dump()
    write_atomically(workspace.run_dir / "evaluation.json", (json.dumps(metrics, indent=2) + "\n").encode())
    return metrics


def _source(link: Workspace, distill: DistillConfig) -> TargetSource:
    device = pick_device(link.config.distill.training.device)
    if (link.cache / MANIFEST_NAME).is_file() or distill.caches:
        return open_caches(open_cache(link.cache), distill, device)
    dump = link.config.for_student(link.name).cache
    is_the_teacher = not dump.ensemble and (link.teacher / CONFIG_NAME).is_file()
    return _online(link, link.teacher if is_the_teacher else None)


def _online(link: Workspace, teacher: Path | None) -> OnlineSource:
    device = pick_device(link.config.distill.training.device)
    temperature = link.config.for_student(link.name).cache.profile.temperature
    model = load_model(teacher) if teacher else None
    return OnlineSource(link.data, device, teacher=model, temperature=temperature)
