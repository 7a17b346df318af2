"""Runs a sweep, or the rest of it: takes trials one by one, trains their students, and writes what came of them.

Whoever holds the lock of a student's folder trains it. The system frees the lock when a process ends, however it ends:
the trial is then running in the study and free on disk, and the next process that looks goes on with it.
"""

import math
import shutil
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from tristill.cache.atomic import partial_of
from tristill.cache.manifest import cache_fingerprint, load_manifest
from tristill.cache.secrets import masked
from tristill.pipeline.errors import BusyError
from tristill.pipeline.provenance import locked, read_provenance
from tristill.pipeline.reading import cache_input, reading
from tristill.pipeline.results import read_summary
from tristill.pipeline.runner import build_held
from tristill.pipeline.sweep.check import check_sweep
from tristill.pipeline.sweep.config import SEED, SweepConfig
from tristill.pipeline.sweep.ledger import ledger, probe
from tristill.pipeline.sweep.points import Point, folder_name, in_words
from tristill.pipeline.sweep.records import results_of, write_results
from tristill.pipeline.sweep.results import Ledger, SweepResults, Trial
from tristill.pipeline.sweep.student import Base
from tristill.pipeline.sweep.study import OPEN, SweepStudy, delete_study, held, open_study
from tristill.stages.errors import DivergedError, TargetsError
from tristill.stages.progress import say, waiting
from tristill.stages.training.checkpoint import clear_checkpoints, seconds_kept
from tristill.stages.training.watch import Watch


class PrunedError(Exception):
    """The student was ended early: it is worse than others at this step."""


@dataclass(frozen=True)
class Claim:
    """A trial that this process trains, and the lock of its folder."""

    trial: optuna.Trial
    parameters: Point
    folder: Path
    lock: ExitStack


def run_sweep(sweep: SweepConfig, base: Base, *, force: bool = False, take_over: bool = False) -> SweepResults:
    """Train all students that nobody has trained yet or is training now; what the whole sweep has found so far."""
    check_sweep(sweep, base)
    if force:
        _clear(sweep, base, take_over=take_over)
    shutil.rmtree(_cleared(base), ignore_errors=True)  # now, or what an earlier one that was killed has left
    with (
        reading({"cache": cache_input(base.workspace.cache)}),  # from the first student to the last
        open_study(sweep, base.name, base.folder, _identity(sweep, base), take_over=take_over) as study,
    ):
        return _Worker(sweep, base, study).run()


def _identity(sweep: SweepConfig, base: Base) -> dict[str, Any]:
    """What may not change within a sweep: all that its students have in common, and what they differ in."""
    plain = sweep.model_dump(mode="json", include={"search", "pruning", "metric"})
    plain["search"].pop("trials", None)  # there may be more of them, and of seeds
    fixed = base.fixed_settings([*sweep.vary, *([SEED] if sweep.seeds else [])])
    vary = {f"vary.{key}": value for key, value in sweep.model_dump(mode="json")["vary"].items()}
    return {"cache": cache_fingerprint(base.workspace.cache), **plain, **vary, **fixed}


def _clear(sweep: SweepConfig, base: Base, *, take_over: bool) -> None:
    """Remove the study and every student. Raises BusyError if one of them is being trained, here or elsewhere."""
    base.folder.mkdir(parents=True, exist_ok=True)
    students = base.folder / "students"
    with ExitStack() as locks:
        locks.enter_context(held(base.folder))  # so that nobody begins a student now
        for folder in sorted(students.glob("*")):
            locks.enter_context(locked(folder))
        delete_study(sweep, base.name, base.folder, take_over=take_over)
        for name_of_results in ("results.json", "results.csv"):
            (base.folder / name_of_results).unlink(missing_ok=True)
        shutil.rmtree(_cleared(base), ignore_errors=True)
        if students.is_dir():
            students.rename(_cleared(base))  # in one step: no student is to be found that has lost some of its files


def _cleared(base: Base) -> Path:
    """Where students are that are being removed."""
    return partial_of(base.folder / "students")


class _Worker:
    def __init__(self, sweep: SweepConfig, base: Base, study: SweepStudy) -> None:
        self._sweep, self._base, self._study = sweep, base, study
        found = cache_fingerprint(base.workspace.cache)
        assert found is not None, "checked with the sweep"
        self._cache = found
        self._context = load_manifest(base.workspace.cache).spec.context_length
        self._total = study.num_points * max(1, len(sweep.seeds))

    def run(self) -> SweepResults:
        while (claim := self._claim()) is not None:
            with claim.lock:
                self._train(claim)
                with suppress(OSError):
                    claim.folder.rmdir()  # of a student that could not be begun
            self._write()
        results = self._write(with_ledger=True)
        if running := sum(trial.state == "running" for trial in results.trials):
            say(f"{running} trials are still running in other processes")
        if places := self._study.elsewhere():
            say(
                f"trials that run in {', '.join(places)} are left to the processes there; if those are gone for good, "
                "run the same command with --take-over"
            )
        return results

    def _claim(self) -> Claim | None:
        """A trial that was left by a process that is gone, or one that waits, or a new one; None if all are taken."""
        with held(self._base.folder):
            for trial in self._study.abandoned():
                if (claim := self._hold(trial)) is not None:
                    return claim
            while (new := self._study.next()) is not None:
                if (claim := self._hold(new)) is not None:
                    return claim
        return None

    def _hold(self, trial: optuna.Trial) -> Claim | None:
        """Lock the trial's folder; None if another has, or if there is nothing to train."""
        known = trial.user_attrs.get("parameters")
        with ExitStack() as stack:
            if known is not None and not (self._lock(known, stack) and self._study.is_running(trial)):
                return None  # whoever had the lock may have ended the trial before letting go of it
            parameters = self._study.take(trial)
            if parameters is None or (known is None and not self._lock(parameters, stack)):
                return None
            return Claim(trial, parameters, self._folder(parameters), stack.pop_all())
        return None

    def _lock(self, parameters: Point, stack: ExitStack) -> bool:
        folder = self._folder(parameters)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(locked(folder))
        except BusyError:
            return False
        return True

    def _folder(self, parameters: Point) -> Path:
        return self._base.folder / "students" / folder_name(parameters)

    def _train(self, claim: Claim) -> None:
        """Train the student of a trial, or the rest of it, and say how it ended."""
        trial, study = claim.trial, self._study.study
        started_s = time.monotonic()
        value, state = None, TrialState.FAIL
        try:
            value = self._student(claim)
            state = TrialState.COMPLETE
        except PrunedError:
            clear_checkpoints(claim.folder / "checkpoints")
            state = TrialState.PRUNED
        except (_NoValueError, DivergedError, TargetsError) as exc:
            trial.set_user_attr("reason", masked(str(exc)))
        record = read_provenance(claim.folder)
        told_s = (record.elapsed_s or record.earlier_s) if record else None  # of one that was ended: the second
        elapsed_s = time.monotonic() - started_s if told_s is None else told_s
        trial.set_user_attr("elapsed_s", elapsed_s)
        study.tell(trial, value, state)
        self._say(claim, state, value, elapsed_s)

    def _student(self, claim: Claim) -> float:
        problems = self._base.problems(claim.parameters)
        if problems:  # of a combination that was drawn
            raise _NoValueError("; ".join(problems))
        step = self._base.student(claim.parameters)
        step.watch = self._watch(claim.trial)
        build_held(step, seconds_kept(claim.folder / "checkpoints"))
        summary = read_summary(claim.folder)
        claim.trial.set_user_attr("summary", summary)
        value = summary["validation"].get(self._sweep.metric_name)
        if value is None or not math.isfinite(value):
            raise _NoValueError(f"{self._sweep.metric} of the finished student is {value}")
        return float(value)

    def _watch(self, trial: optuna.Trial) -> Watch | None:
        pruning = self._sweep.pruning
        if pruning is None:
            return None
        seen = dict(self._study.study.get_trials(deepcopy=False)[trial.number].intermediate_values)

        def report(step: int, metrics: dict[str, float | None]) -> None:
            value = metrics[self._sweep.metric_name]
            if step not in seen:  # else it was resumed from before that look
                trial.report(math.nan if value is None else value, step)
            if step >= max(seen, default=0) and trial.should_prune():
                raise PrunedError

        return Watch(pruning.every, pruning.windows, report)

    def _write(self, *, with_ledger: bool = False) -> SweepResults:
        with held(self._base.folder):
            trials = self._study.trials()
            results = results_of(self._base.name, self._sweep, trials, self._base.folder, self._cache)
            is_done = not any(trial.state in {"running", "waiting"} for trial in results.trials)
            if with_ledger and is_done:
                found = self._ledger(results)
                is_ledger = isinstance(found, Ledger)
                results = results.model_copy(
                    update={"ledger": found if is_ledger else None, "ledger_missing": None if is_ledger else found}
                )
            elif with_ledger:
                results = results.model_copy(update={"ledger_missing": "trials are still running or waiting"})
            write_results(results, self._base.folder)
        return results

    def _ledger(self, results: SweepResults) -> Ledger | str:
        trained = [(trial.elapsed_s or 0.0, self._positions(trial)) for trial in results.trials]
        trained = [(seconds, positions) for seconds, positions in trained if positions]
        if not trained:
            return "no student was trained"
        study = self._study.study
        steps = study.user_attrs.get("probe")
        if steps is None:
            with waiting("measuring steps with and without the cache"):
                found = probe(self._base)
            if isinstance(found, str):
                return found
            steps = found
            study.set_user_attr("probe", steps)
        return ledger(self._base, [(cached_s, online_s) for cached_s, online_s in steps], trained)

    def _positions(self, trial: Trial) -> int:
        """Positions that were trained: of one that was ended early, up to the last look."""
        if trial.train is not None:
            return int(trial.train["positions"])
        if not trial.looks:
            return 0
        training = self._base.student(trial.parameters).config.distill.training
        return int(trial.looks[-1][0] * training.batch_windows * training.accumulation * self._context)

    def _say(self, claim: Claim, state: TrialState, value: float | None, elapsed_s: float) -> None:
        done = sum(trial.state not in OPEN for trial in self._study.trials())
        title = self._sweep.metric_name.replace("_", " ")
        ends = {TrialState.PRUNED: "ended early", TrialState.FAIL: "failed"}
        end = f"{title} {value:.5g}" if value is not None else ends[state]
        who = f"trial {claim.trial.number}, {in_words(claim.parameters)}"
        say(f"{done} of {self._total} done: {who}: {end}, {elapsed_s:,.0f} s")


class _NoValueError(Exception):
    """A student that cannot be ranked; the text says why."""
