"""What was predicted of a run, beside what happened."""

from collections.abc import Iterator
from dataclasses import dataclass

from tristill.cache import CacheError
from tristill.pipeline.errors import StaleError
from tristill.pipeline.plan.prediction import PLAN_NAME, CachePrediction, Plan, StagePrediction, load_plan
from tristill.pipeline.plan.settings import settings_fingerprint
from tristill.pipeline.plan.sizes import cache_sizes
from tristill.pipeline.results import read_summary
from tristill.pipeline.step import Step
from tristill.pipeline.steps import DumpLogits, all_steps
from tristill.pipeline.tokenize_step import Tokenize
from tristill.pipeline.workspace import Workspace
from tristill.stages.data.tokenized import load_corpus


@dataclass(frozen=True)
class Comparison:
    """One figure. what: the step and the quantity, in words; unit: positions, bytes, MiB or s."""

    what: str
    unit: str
    predicted: float
    happened: float

    @property
    def ratio(self) -> float:
        """What happened over what was predicted; infinite where nothing was."""
        return self.happened / self.predicted if self.predicted else float("inf")


def compare(workspace: Workspace) -> list[Comparison]:
    """Every figure of the run's plan whose step was finished since, in the order of the steps; empty without a plan.

    Raises StaleError for a plan of other settings.
    """
    plan = load_plan(workspace.run_dir)
    if plan is None:
        return []
    if plan.settings != settings_fingerprint(workspace.config):
        raise StaleError(
            f"{workspace.run_dir / PLAN_NAME}: was made for other settings than those of this config; run "
            "`tristill plan` again"
        )
    steps = {step.label: step for step in all_steps(workspace)}
    rows: list[Comparison] = []
    for predicted in plan.stages:
        step = steps[predicted.step]
        if predicted.elapsed_s and step.is_complete():
            rows += _rows(step, predicted)
            if isinstance(step, DumpLogits):
                rows += _cache_rows(step, _of_link(plan, workspace, step))
    return rows


def _rows(step: Step, predicted: StagePrediction) -> Iterator[Comparison]:
    if isinstance(step, Tokenize):
        corpus = load_corpus(step.folder)
        size = corpus.context_length
        positions: int | None = sum((split.tokens - 1) // size * size for split in corpus.splits.values())
    elif isinstance(step, DumpLogits):
        positions = None  # said of the cache, by split
    else:
        trained = read_summary(step.folder)["train"]
        positions = trained["positions"] if trained else None
    if positions is not None:
        yield Comparison(f"{step.label}: positions", "positions", predicted.positions, positions)
    record = step.provenance()
    if record is not None and record.elapsed_s is not None and record.peak_rss_mib is not None:
        known = ", at least" if record.is_resumed else ""
        yield Comparison(f"{step.label}: time{known}", "s", predicted.elapsed_s, record.elapsed_s)
        yield Comparison(f"{step.label}: peak RSS", "MiB", predicted.peak_rss_mib, record.peak_rss_mib)


def _of_link(plan: Plan, workspace: Workspace, step: DumpLogits) -> CachePrediction:
    stages = workspace.config.stages
    return plan.stage_caches[step.workspace.name] if step.workspace.name in stages else plan.cache


def _cache_rows(step: DumpLogits, predicted: CachePrediction) -> Iterator[Comparison]:
    try:
        found = cache_sizes(step.folder, "")
    except CacheError:
        return
    for split, positions in predicted.positions.items():
        yield Comparison(f"{step.label}: {split} positions", "positions", positions, found.positions[split])
    for name, num_bytes in predicted.dataset_bytes.items():
        yield Comparison(f"{step.label}: {name}", "bytes", num_bytes, found.dataset_bytes.get(name, 0.0))
    yield Comparison(f"{step.label}: all files", "bytes", predicted.total_bytes, found.total_bytes)
