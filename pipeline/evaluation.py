"""Evaluates checkpoints of a run, or any other model folders, on the run's validation split."""

import json
from pathlib import Path
from typing import Any

from tristill.cache import open_cache
from tristill.cache.atomic import write_atomically
from tristill.cache.layout import MANIFEST_NAME, TOKENIZER_NAME
from tristill.cache.manifest import cache_fingerprint
from tristill.cache.regular_file import read_json_object
from tristill.cache.spec import SplitName
from tristill.pipeline.errors import MissingInputError
from tristill.pipeline.reading import cache_input, reading, strict_inputs
from tristill.pipeline.results import run_rows
from tristill.pipeline.workspace import Workspace
from tristill.stages.data.tokenizer_gate import require_same_tokenizer
from tristill.stages.distill.caches import open_caches
from tristill.stages.distill.config import DistillConfig
from tristill.stages.distill.distill import CO_TEACHER
from tristill.stages.errors import CheckpointError
from tristill.stages.evaluate.evaluate import basis, evaluate
from tristill.stages.evaluate.metrics import ValidationMetrics
from tristill.stages.models.checkpoint import load_model, pick_device
from tristill.stages.models.description import CONFIG_NAME
from tristill.stages.models.origin import content_fingerprint, refuse_untrusted_record
from tristill.stages.progress import say
from tristill.stages.targets.online import OnlineSource
from tristill.stages.targets.source import TargetSource

EVALUATION_NAME = "evaluation.json"


def evaluate_models(
    workspace: Workspace, names: tuple[str, ...], *, force: bool = False, split: SplitName = "validation"
) -> dict[str, dict[str, Any]]:
    """Held-out metrics per model; all finished models of the run if none is named.

    Writes evaluation.json, or evaluation-test.json of the test split.

    Metrics that were computed of the same weights, targets and settings, at the end of a training or by an earlier
    evaluation, are taken as they are, unless `force` is set.

    Each student is judged by its own teacher, everything else by that of the last link. Teacher metrics come from the
    teacher that moved with the student, if there is one in its folder; else from the validation targets of the link's
    cache, or caches, or from the teacher itself where there is no cache.
    """
    folders = {name: workspace.model_folder(name) for name in names or _names(workspace)}
    if not folders:
        raise MissingInputError(f"{workspace.run_dir}: found no trained model; run `tristill run --until distill`")
    caches, others = _places(workspace, folders)
    with reading(strict_inputs(*others) | {str(place): cache_input(place) for place in caches}) as held:
        found = dict.fromkeys(map(str, others)) | {str(place): cache_fingerprint(place) for place in caches}
        metrics = _metrics(workspace, folders, force=force, split=split)
        held.refuse_moved(found)
        write_atomically(workspace.run_dir / _file_name(split), (json.dumps(metrics, indent=2) + "\n").encode())
    return metrics


def _link_of(workspace: Workspace, name: str) -> Workspace:
    return workspace.link(workspace.config.link_names[0] if name == "teacher" else name)


def _places(workspace: Workspace, folders: dict[str, Path]) -> tuple[set[Path], set[Path]]:
    """The caches, and all other folders, that an evaluation of the models in these folders reads."""
    caches, others = set[Path](), set(folders.values())
    for name, folder in folders.items():
        link = _link_of(workspace, name)
        further = link.config.for_student(link.name).distill.caches
        if (folder / CO_TEACHER / CONFIG_NAME).is_file():
            others |= {link.data, folder / CO_TEACHER}
            continue
        link.refuse_outside("distill.caches")
        if (link.cache / MANIFEST_NAME).is_file() or further:
            caches |= {link.cache, *(one.dir for one in further)}
        else:
            others |= {link.data, link.teacher}
    return caches, others


def _metrics(
    workspace: Workspace, folders: dict[str, Path], *, force: bool, split: SplitName
) -> dict[str, dict[str, Any]]:
    """Those of each model, as they are known or as they are computed."""
    device = pick_device(workspace.config.distill.training.device)
    sources: dict[tuple[object, ...], TargetSource] = {}
    metrics = {}
    for name, folder in folders.items():
        refuse_untrusted_record(folder)
        link = _link_of(workspace, name)
        distill = link.config.for_student(link.name).distill
        moved = folder / CO_TEACHER
        if (moved / CONFIG_NAME).is_file():
            source: TargetSource = _online(link, moved)
        else:
            key = (link.cache, distill.caches, distill.shares, distill.tail)
            if key not in sources:
                sources[key] = _source(link, distill)
            source = sources[key]
        if split not in source.splits:
            raise MissingInputError(
                f"{workspace.run_dir}: found splits {sorted(source.splits)}, expected {split}; name a source in "
                f"data.{split} and run from `tristill tokenize --force` on"
            )
        evaluation = workspace.config.for_student(name).evaluate
        fingerprint = content_fingerprint(folder)
        follows_from = basis(fingerprint, source, evaluation) if fingerprint else None
        known = None if force or follows_from is None else _known(workspace, name, folder, follows_from, split)
        if known is None:
            model = load_model(folder).to(device)
            require_same_tokenizer(
                folder / TOKENIZER_NAME,
                source.tokenizer_path,
                name,
                "evaluate it with the run that it is of, by --run-dir",
            )
            known = evaluate(model, source, evaluation, name, split=split)
        metrics[name] = {**known.model_dump(), "basis": follows_from}
    return metrics


def _file_name(split: SplitName) -> str:
    return EVALUATION_NAME if split == "validation" else f"evaluation-{split}.json"


def _known(
    workspace: Workspace, name: str, folder: Path, follows_from: str, split: SplitName
) -> ValidationMetrics | None:
    """Metrics of this basis in the model's summary, or in evaluation.json."""
    for path, key in ((folder / "summary.json", split), (workspace.run_dir / _file_name(split), name)):
        try:
            record = read_json_object(path)
            if follows_from not in (record.get("basis"), record[key].get("basis")):
                continue
            metrics = ValidationMetrics.model_validate(record[key])
        except (OSError, ValueError, KeyError, AttributeError):
            continue  # what cannot be read is computed
        say(f"{name}: unchanged since its metrics in {path.name} were computed; --force computes them again")
        return metrics
    return None


def _names(workspace: Workspace) -> list[str]:
    """The finished models of the run, without those elsewhere whose records are not followed, of which it says so."""
    names = []
    for row in run_rows(workspace):
        try:
            refuse_untrusted_record(workspace.model_folder(row.name))
        except CheckpointError as exc:
            say(f"{row.name}: left out: {exc}")
        else:
            names.append(row.name)
    return names


def _source(link: Workspace, distill: DistillConfig) -> TargetSource:
    device = pick_device(link.config.distill.training.device)
    link.refuse_outside("distill.caches")
    if (link.named_cache / MANIFEST_NAME).is_file() or distill.caches:
        return open_caches(open_cache(link.cache), distill, device)
    dump = link.config.for_student(link.name).cache
    is_the_teacher = not dump.ensemble and (link.teacher / CONFIG_NAME).is_file()
    return _online(link, link.teacher if is_the_teacher else None)


def _online(link: Workspace, teacher: Path | None) -> OnlineSource:
    device = pick_device(link.config.distill.training.device)
    temperature = link.config.for_student(link.name).cache.profile.temperature
    model = load_model(teacher) if teacher else None
    return OnlineSource(link.data, device, teacher=model, temperature=temperature)
