"""Makes a plan: rehearses every step that is to be run, in order, in a temporary folder, and counts up from there."""

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tristill.cache.spec import SplitName
from tristill.pipeline.config import DEFAULT_STUDENT, Config, save_config
from tristill.pipeline.plan.bounds import affordable_positions, measured_on
from tristill.pipeline.plan.child import rehearsed
from tristill.pipeline.plan.in_small import in_small, training_of
from tristill.pipeline.plan.prediction import PLAN_NAME, CachePrediction, Plan, StagePrediction, load_plan
from tristill.pipeline.plan.rehearsal import Rehearsed, Request, link_all_but
from tristill.pipeline.plan.settings import settings_fingerprint
from tristill.pipeline.plan.sizes import cache_sizes, extrapolated, scaled
from tristill.pipeline.reading import reading, strict_inputs
from tristill.pipeline.runner import plan as steps_to_run
from tristill.pipeline.step import Step
from tristill.pipeline.steps import DumpLogits, Teacher, all_steps
from tristill.pipeline.tokenize_step import Tokenize
from tristill.pipeline.workspace import RUN_CONFIG_NAME, Workspace
from tristill.stages.data.tokenized import load_corpus
from tristill.stages.dump.config import MEASURED_POSITIONS
from tristill.stages.plan.corpus import CorpusInSmall, expected_tokens
from tristill.stages.plan.corpus import in_small as corpus_in_small
from tristill.stages.plan.sample import sample_corpus
from tristill.stages.progress import say, waiting

SAMPLE_POSITIONS = 81_920
_VALIDATION_POSITIONS = 8_192
_SPLITS: tuple[SplitName, ...] = ("train", "validation")
_NO_CACHE = CachePrediction(positions={}, dataset_bytes={}, total_bytes=0.0, basis="no step makes one")


@dataclass(frozen=True)
class Budget:
    """Seconds, about: of the measured part of every rehearsal, and of a teacher's whose cache is to be predicted."""

    step_s: float
    teacher_s: float


def plan_of(workspace: Workspace, budget: Budget) -> Plan:
    """The plan of a run, made anew and kept in its folder, of which nothing else is touched.

    Finished steps count as done, with what was predicted of them before, if anything was.
    """
    started = time.monotonic()
    fingerprint = settings_fingerprint(workspace.config)
    before = load_plan(workspace.run_dir)
    if before is not None and before.settings != fingerprint:
        before = None
    todo = {step.label for step in steps_to_run(workspace, "distill")}
    steps = [step for step in all_steps(workspace) if step.label in todo or step.is_complete()]
    measured = measured_on(workspace, budget.step_s, budget.teacher_s, sorted(todo))
    if before is not None and before.measured == measured:
        say(f"plan: as measured before; delete {workspace.run_dir / PLAN_NAME} to measure again")
        return before
    for step in steps:
        if step.label in todo:
            step.refuse_outside()
    done = [step.folder for step in steps if step.label not in todo]
    with (
        tempfile.TemporaryDirectory(prefix="tristill-plan-", ignore_cleanup_errors=True) as folder,
        reading(strict_inputs(*done)),
    ):
        rehearsals = _Rehearsals(workspace, Path(folder), budget, todo)
        for step in steps:
            if step.label not in todo:
                rehearsals.add_finished(step, before)
        for number, step in enumerate((step for step in steps if step.label in todo), start=1):
            with waiting(f"plan: {step.label} ({number} of {len(todo)})"):
                rehearsals.add(step)
    order = [step.label for step in steps]
    caches = rehearsals.caches
    made = Plan(
        settings=fingerprint,
        threads=rehearsals.threads or (before.threads if before else os.cpu_count() or 1),
        stages=tuple(sorted(rehearsals.stages, key=lambda stage: order.index(stage.step))),
        cache=caches.pop(DEFAULT_STUDENT, _NO_CACHE),
        stage_caches=caches,
        planned_s=time.monotonic() - started,
        measured=measured,
    )
    made.save(workspace.run_dir)
    return made


class _Rehearsals:
    """The run in small as far as it is, and what was predicted from it.

    Folders: `all` has the corpus, or a part that stands for it; `whole` all of its train split and few validation
    windows, for the teacher; `run` a sample of windows, and all that is made of them; `young` the same of a teacher
    that is half as old.
    """

    def __init__(self, workspace: Workspace, folder: Path, budget: Budget, todo: set[str]) -> None:
        self._workspace = workspace
        self._config: Config = workspace.config
        self._folder = folder
        self._budget = budget
        self._run = folder / "run"
        self._run.mkdir()
        self._small = in_small(workspace.config)
        self._tokens: dict[SplitName, int] = {}
        self._context_length = self._config.data.context_length
        self._sampled = 0
        self._ages: dict[Path, int] = {}  # steps that a rehearsed teacher was trained for, while it is to be older
        self._dumped = [step for step in all_steps(workspace) if isinstance(step, DumpLogits) and step.label in todo]
        self.stages: list[StagePrediction] = []
        self.caches: dict[str, CachePrediction] = {}
        self.threads = 0
        save_config(workspace.config, folder / RUN_CONFIG_NAME)

    def add_finished(self, step: Step, before: Plan | None) -> None:
        """A step that is done: its artefact stands in the place of a rehearsed one."""
        known = {stage.step: stage for stage in before.stages} if before else {}
        if isinstance(step, Tokenize):
            corpus = load_corpus(step.folder)
            self._take_corpus(step.folder, {split: corpus.splits[split].tokens for split in _SPLITS})
        else:
            place = self._in_small(step, self._run).folder
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(step.folder.resolve())
        if isinstance(step, DumpLogits):
            name = step.workspace.name
            predicted = {**before.stage_caches, DEFAULT_STUDENT: before.cache}.get(name) if before else None
            self.caches[name] = predicted or cache_sizes(step.folder, "it is there")
        found = known.get(step.label) or self._stage(step, 0.0, 0.0, "finished before any plan")
        self.stages.append(found.model_copy(update={"is_done": True}))

    def add(self, step: Step) -> None:
        """Rehearse a step, and predict it from that."""
        if isinstance(step, Tokenize):
            self._add_tokenize(step)
        elif isinstance(step, DumpLogits):
            self._add_dump(step)
        else:
            self._add_model(step)

    def _add_tokenize(self, step: Tokenize) -> None:
        small = corpus_in_small(self._config.data)
        part = self._folder / "part.toml"
        save_config(self._config.model_copy(update={"data": small.config}), part)
        request = self._request(step, self._folder / "all").model_copy(update={"config": part})
        found = self._rehearse(request)
        data = self._folder / "all" / "data"
        self._take_corpus(data, expected_tokens(self._config.data, small, data))
        share = sum(self._tokens.values()) / sum(split.tokens for split in load_corpus(data).splits.values())
        basis = "tokenized, and thrown away" if small.is_whole else _part_basis(small, share)
        self._append(step, found.fixed_s * share, found, basis, disk_bytes=found.disk_bytes * share)

    def _take_corpus(self, data: Path, tokens: dict[SplitName, int]) -> None:
        """Draw the samples that everything after the tokens is rehearsed on."""
        self._tokens = tokens
        corpus = load_corpus(data)
        self._context_length = corpus.context_length
        trainings = [training for step in all_steps(self._workspace) if (training := training_of(step))]
        batch = max(training.batch_windows for training in trainings)
        affordable = affordable_positions(self._workspace, corpus.vocab_size, self._budget.step_s)
        positions = min(SAMPLE_POSITIONS, affordable)
        train = max(positions // corpus.context_length, batch if affordable < SAMPLE_POSITIONS else 2 * batch)
        wanted: dict[SplitName, int] = {
            "train": train,
            "validation": max(1, min(_VALIDATION_POSITIONS, positions // 4) // corpus.context_length),
        }
        self._sampled = train
        everything: dict[SplitName, int] = dict.fromkeys(_SPLITS, 2**62)
        seen = {**everything, "train": self._config.cache.max_train_windows or 2**62}
        sample_corpus(data, self._run / "data", wanted, seen)
        sample_corpus(data, self._folder / "whole" / "data", {**wanted, "train": 2**62}, everything)

    def _add_model(self, step: Step) -> None:
        """A teacher or student; one whose cache is to be dumped is trained longer, and once more for half as long."""
        is_to_dump = any(step.folder == dump.needs["teacher"].folder for dump in self._dumped)
        training = training_of(step)
        home = self._folder / "whole" if isinstance(step, Teacher) else self._run
        teacher_s = self._budget.teacher_s if is_to_dump else 0.0
        found = self._rehearse(self._request(step, home).model_copy(update={"teacher_s": teacher_s}))
        if home != self._run:
            (self._run / "teacher").symlink_to(home / "teacher")
        if training is None:
            self._append(step, self._evaluated(found) + found.fixed_s, found, "copied, and evaluated in part")
            return
        if is_to_dump and found.steps < training.steps:
            self._ages[step.folder] = found.steps
        seconds = found.fixed_s + training.steps * found.unit_s + self._evaluated(found)
        seconds += (training.steps - 1) // training.checkpoint_every * found.checkpoint_s
        basis = f"{found.num_units:,} steps measured of {training.steps:,}"
        self._append(step, seconds, found, basis, scratch_bytes=2 * found.checkpoint_bytes)

    def _add_dump(self, step: DumpLogits) -> None:
        small = self._in_small(step, self._run)
        found = self._rehearse(self._request(step, self._run))
        positions = self._positions_of(step)
        age = self._ages.get(step.needs["teacher"].folder)
        given = scaled(small.folder, positions, f"a sample of {found.num_units:,} positions dumped by its teacher")
        if age is not None:
            given = self._of_an_older_teacher(step, age, given)
        self.caches[step.workspace.name] = given
        seconds = found.fixed_s * self._calibration_share(step) + sum(positions.values()) * found.unit_s
        basis = f"{found.num_units:,} positions measured of {sum(positions.values()):,}"
        self._append(step, seconds, found, basis, disk_bytes=given.total_bytes)

    def _calibration_share(self, step: DumpLogits) -> float:
        """How many times more windows the calibration forwards than the rehearsal had."""
        size = self._context_length
        wanted = step.config.cache.calibration_windows + round(MEASURED_POSITIONS / size)
        available = max(1, self._positions_of(step)["train"] // size)
        return max(1.0, min(wanted, available) / max(1, min(wanted, self._sampled)))

    def _of_an_older_teacher(self, step: DumpLogits, age: int, old: CachePrediction) -> CachePrediction:
        """Rehearse teacher and dump at half the age too, and follow the line through both."""
        teacher = step.needs["teacher"]
        training = training_of(teacher)
        assert training is not None, "it has an age"
        young = self._folder / f"young-{step.workspace.name}"
        home = self._folder / "whole" if isinstance(teacher, Teacher) else self._run
        small_teacher, small_dump = self._in_small(teacher, young), self._in_small(step, young)
        link_all_but([part.folder.relative_to(young) for part in (small_teacher, small_dump)], home, young)
        half = max(1, age // 2)
        self._rehearse(self._request(teacher, young).model_copy(update={"steps": half}))
        (young / "data").unlink()
        (young / "data").symlink_to(self._run / "data")
        self._rehearse(self._request(step, young).model_copy(update={"once": True}))
        return extrapolated(scaled(small_dump.folder, old.positions, ""), old, (half, age), training.steps)

    def _request(self, step: Step, folder: Path) -> Request:
        config = self._folder / RUN_CONFIG_NAME
        return Request(config=config, folder=folder, step=step.label, budget_s=self._budget.step_s)

    def _rehearse(self, request: Request) -> Rehearsed:
        found = rehearsed(request, self._folder)
        self.threads = found.threads
        return found

    def _in_small(self, step: Step, folder: Path) -> Step:
        return next(s for s in all_steps(Workspace(self._small, folder)) if s.label == step.label)

    def _evaluated(self, found: Rehearsed) -> float:
        return found.evaluated_s * self._positions("validation")

    def _positions(self, split: SplitName) -> int:
        size = self._context_length
        return max(0, self._tokens[split] - 1) // size * size

    def _positions_of(self, step: DumpLogits) -> Mapping[str, int]:
        most = step.config.cache.max_train_windows
        train = self._positions("train")
        kept = train if most is None else min(train, most * self._context_length)
        return {"train": kept, "validation": self._positions("validation")}

    def _append(
        self,
        step: Step,
        elapsed_s: float,
        found: Rehearsed,
        basis: str,
        disk_bytes: float | None = None,
        scratch_bytes: float = 0.0,
    ) -> None:
        stage = self._stage(step, elapsed_s, found.peak_rss_mib, basis)
        disk = found.disk_bytes if disk_bytes is None else disk_bytes
        further = {"disk_bytes": disk, "scratch_bytes": scratch_bytes, "refused_exports": found.refused_exports}
        self.stages.append(stage.model_copy(update=further))

    def _stage(self, step: Step, elapsed_s: float, peak_rss_mib: float, basis: str) -> StagePrediction:
        training = training_of(step)
        if isinstance(step, Tokenize):
            positions = sum(self._positions(split) for split in _SPLITS)
        elif isinstance(step, DumpLogits):
            positions = sum(self._positions_of(step).values())
        elif training is None:
            positions = 0
        else:
            positions = training.steps * training.batch_windows * training.accumulation * self._context_length
        return StagePrediction(
            step=step.label, positions=positions, elapsed_s=elapsed_s, peak_rss_mib=peak_rss_mib, basis=basis
        )


def _part_basis(small: CorpusInSmall, share: float) -> str:
    what = f"{1 / share:.1%} of the corpus"
    return f"{what} tokenized, which was limited beforehand" if small.is_limited else f"{what} tokenized"
