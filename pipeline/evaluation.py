"""Evaluates checkpoints of a run, or any other model folders, on the run's validation split."""

import json
from pathlib import Path
from typing import Any

from cache import open_cache
from cache.atomic import write_atomically
from cache.layout import MANIFEST_NAME, TOKENIZER_NAME
from pipeline.errors import MissingInputError
from pipeline.results import run_rows
from pipeline.steps import Workspace
from stages.errors import CheckpointError
from stages.evaluate.evaluate import evaluate
from stages.models.folder import CONFIG_NAME, load_model, pick_device
from stages.targets.cached import CachedSource
from stages.targets.online import OnlineSource
from stages.targets.source import TargetSource


def evaluate_models(workspace: Workspace, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Held-out metrics per model; all finished models of the run if none is named. Writes evaluation.json.

    Teacher metrics come from the cache's validation targets, or from the teacher itself where there is no cache.
    """
    folders = {name: _folder(workspace, name) for name in names or [row.name for row in run_rows(workspace)]}
    if not folders:
        raise MissingInputError(f"{workspace.run_dir}: found no trained model; run `tristill run --until distill`")
    config = workspace.config
    device = pick_device(config.distill.training.device)
    source = _source(workspace)
    metrics = {}
    for name, folder in folders.items():
        model = load_model(folder).to(device)
        if (folder / TOKENIZER_NAME).read_bytes() != source.tokenizer_path.read_bytes():
            raise CheckpointError(f"{folder}: found another tokenizer than {source.tokenizer_path}, expected the same")
        metrics[name] = evaluate(model, source, config.evaluate, name).model_dump()
    write_atomically(workspace.run_dir / "evaluation.json", (json.dumps(metrics, indent=2) + "\n").encode())
    return metrics


def _folder(workspace: Workspace, name: str) -> Path:
    places = [workspace.teacher] if name == "teacher" else [workspace.student(name), Path(name)]
    for folder in places:
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise MissingInputError(f"{name}: found no model in {' or '.join(str(place) for place in places)}")


def _source(workspace: Workspace) -> TargetSource:
    device = pick_device(workspace.config.distill.training.device)
    if (workspace.cache / MANIFEST_NAME).is_file():
        return CachedSource(open_cache(workspace.cache), device)
    teacher = load_model(workspace.teacher) if (workspace.teacher / CONFIG_NAME).is_file() else None
    return OnlineSource(workspace.data, device, teacher=teacher, temperature=workspace.config.cache.profile.temperature)
