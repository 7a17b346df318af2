"""The Optuna study of a sweep: its points as trials, and who trains which.

A trial is one student. What Optuna keeps of it as user attributes:

    parameters  dotted keys and values, with the seed       place   the sweep folder where it is or was trained
    asked       it was drawn, and not queued                 where   that folder and its host, for people
    same_as     number of an earlier trial with these parameters, which is the one that counts
    summary, elapsed_s, reason                               what came of it
"""

import json
import os
import socket
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from tristill.cache.atomic import write_atomically
from tristill.cache.hashing import fingerprint_of
from tristill.pipeline.errors import BusyError, ConfigError, StaleError, StudyError
from tristill.pipeline.provenance import flat, locked
from tristill.pipeline.sweep.config import Grid, HalvingPruning, MedianPruning, Range, SweepConfig, TpeSearch
from tristill.pipeline.sweep.points import Point, grid, with_seeds, without_seed
from tristill.stages.progress import waiting

_PLACE_NAME = "place"
_DATABASE_NAME = "study.db"
_SQLITE_WAIT_S = 120
OPEN = (TrialState.RUNNING, TrialState.WAITING)


class PerTrialSampler(BaseSampler):
    """Draws as a function of the seed, the trial's number and what is known of earlier trials.

    So a sweep that was killed draws on as if it had not been, and processes draw different points.
    """

    def __init__(self, search: Any) -> None:
        self._search = search
        self._number: int | None = None
        self._sampler: BaseSampler = RandomSampler()

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            seed = int(fingerprint_of([self._search.seed, trial.number])[:8], 16)
            self._number = trial.number
            self._sampler = (
                TPESampler(seed=seed, n_startup_trials=self._search.startup_trials)
                if isinstance(self._search, TpeSearch)
                else RandomSampler(seed=seed)
            )
        return self._sampler

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As the sampler of this trial."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As the sampler of this trial."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As the sampler of this trial."""
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)


class SweepStudy:
    """A study that is open."""

    def __init__(self, sweep: SweepConfig, folder: Path, study: optuna.Study, *, take_over: bool) -> None:
        self.sweep = sweep
        self.folder = folder
        self.study = study
        self._take_over = take_over
        self._distributions = {key: _distribution(varied) for key, varied in sweep.vary.items()}
        self._place = _place(folder)
        self._points = list(grid(sweep)) if isinstance(sweep.search, Grid) else []

    @property
    def num_points(self) -> int:
        """Points that are to be tried."""
        return len(self._points) if isinstance(self.sweep.search, Grid) else self.sweep.search.trials

    def trials(self) -> list[FrozenTrial]:
        """Those that count, whose parameters are known."""
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if "parameters" in trial.user_attrs and "same_as" not in trial.user_attrs
        ]

    def abandoned(self) -> list[optuna.Trial]:
        """Running trials that this process may go on with, if it can lock their folders.

        Those of another place are left alone: a lock there cannot be seen from here. With the sweep's own SQLite file
        all are of this place, and one without a place was left by a process that was killed as it took it.
        """
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        is_ours = self._take_over or self.sweep.storage is None
        return [
            optuna.Trial(self.study, trial._trial_id)  # noqa: SLF001 - as study.ask makes it; by number there is none
            for trial in running
            if is_ours or trial.user_attrs.get("place") == self._place
        ]

    def is_running(self, trial: optuna.Trial) -> bool:
        """Whether it has not ended since it was looked up."""
        return self.study.get_trials(deepcopy=False)[trial.number].state == TrialState.RUNNING

    def elsewhere(self) -> list[str]:
        """Where trials run that this process leaves alone."""
        return _places_of_running(self.study, self._place)

    def next(self) -> optuna.Trial | None:
        """A trial that waits, or a new one; None if there are enough. To be called with the folder locked."""
        self._queue_missing()
        is_drawn = not isinstance(self.sweep.search, Grid)
        if not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)) and not (
            is_drawn and self._num_asked() < self.num_points
        ):
            return None
        return self.study.ask()

    def take(self, trial: optuna.Trial) -> Point | None:
        """Note that a trial is trained here; its parameters, or None if an earlier one has the same."""
        trial.set_user_attr("place", self._place)
        trial.set_user_attr("where", f"{socket.gethostname()}:{self.folder.resolve()}")
        drawn = {key: trial._suggest(key, distribution) for key, distribution in self._distributions.items()}  # noqa: SLF001 - suggest_* by kind
        parameters: Point | None = trial.user_attrs.get("parameters")
        if parameters is None:
            point = {key: self._decode(key, value) for key, value in drawn.items()}
            parameters = with_seeds(point, self.sweep)[0]
            trial.set_user_attr("asked", True)  # noqa: FBT003 - Optuna's signature
            trial.set_user_attr("parameters", parameters)
        earlier = [one for one in self.trials() if one.number < trial.number]
        same = next((one.number for one in earlier if one.user_attrs["parameters"] == parameters), None)
        if same is not None:
            trial.set_user_attr("same_as", same)
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        return parameters

    def _num_asked(self) -> int:
        return sum(1 for trial in self.study.get_trials(deepcopy=False) if trial.user_attrs.get("asked"))

    def _queue_missing(self) -> None:
        """Queue students that are known to be wanted and are not there: a grid's, and those of further seeds."""
        students = [trial.user_attrs["parameters"] for trial in self.trials()]
        known = {fingerprint_of(parameters) for parameters in students}
        points = self._points or [without_seed(parameters, self.sweep) for parameters in students]
        for parameters in [student for point in points for student in with_seeds(point, self.sweep)]:
            if (name := fingerprint_of(parameters)) not in known:
                known.add(name)
                encoded = {key: self._encode(key, parameters[key]) for key in self.sweep.vary}
                self.study.enqueue_trial(encoded, user_attrs={"parameters": parameters})

    def _encode(self, key: str, value: Any) -> Any:
        return json.dumps(value) if isinstance(self._distributions[key], CategoricalDistribution) else value

    def _decode(self, key: str, value: Any) -> Any:
        return json.loads(value) if isinstance(self._distributions[key], CategoricalDistribution) else value


@contextmanager
def open_study(
    sweep: SweepConfig, name: str, folder: Path, identity: dict[str, Any], *, take_over: bool
) -> Iterator[SweepStudy]:
    """The study, made if it is not there. Raises StaleError if it was begun with other settings."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with held(folder):
            storage = stack.enter_context(_storage(sweep, folder))
            pruner, sampler = _pruner(sweep), PerTrialSampler(sweep.search)
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                direction=sweep.direction,
                load_if_exists=True,
                sampler=sampler,
                pruner=pruner,
            )
            begun = study.user_attrs.get("identity")
            if begun is None:
                study.set_user_attr("identity", identity)
        if begun is not None:
            _refuse_other_settings(name, folder, flat(begun), flat(identity))
        yield SweepStudy(sweep, folder, study, take_over=take_over)


def delete_study(sweep: SweepConfig, name: str, folder: Path, *, take_over: bool) -> None:
    """Forget every trial; nothing if there is no study. To be called with the folder locked.

    Raises BusyError if trials run at other places that share the storage, unless those are to be taken over.
    """
    if sweep.storage is None:
        for path in folder.glob(f"{_DATABASE_NAME}*"):  # with SQLite's journals; readable or not, it is the sweep's own
            path.unlink()
        return
    with _storage(sweep, folder) as storage:
        if name not in optuna.get_all_study_names(storage):
            return
        study = optuna.load_study(study_name=name, storage=storage)
        if (places := _places_of_running(study, _known_place(folder))) and not take_over:
            raise BusyError(
                f"{_safe(sweep, folder)}: trials of the sweep {name} run in {', '.join(places)}, which --force would "
                "forget; wait for them, or add --take-over if their processes are gone for good"
            )
        optuna.delete_study(study_name=name, storage=storage)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder for this process, and say so where another one has to be waited for."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except BusyError:
            with waiting(f"waiting for another process that holds {folder}"):
                stack.enter_context(locked(folder, wait=True))
        yield


@contextmanager
def _storage(sweep: SweepConfig, folder: Path) -> Iterator[RDBStorage]:
    """The data base, for as long as the block lasts. Raises StudyError for all that is wrong with it in the block."""
    try:
        storage = _connected(sweep, folder)
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()
    except (SQLAlchemyError, StorageInternalError) as exc:
        anew = ", or begin anew with --force" if sweep.storage is None else ""
        raise StudyError(
            f"{_safe(sweep, folder)}: the study cannot be read or written: {_first_line(exc)}; mend that and run the "
            f"same command again{anew}"
        ) from exc


def _connected(sweep: SweepConfig, folder: Path) -> RDBStorage:
    try:
        if sweep.storage is None:
            return sqlite_storage(folder / _DATABASE_NAME)
        url = os.path.expandvars(sweep.storage)
        waits = {"connect_args": {"timeout": _SQLITE_WAIT_S}} if url.startswith("sqlite") else {}
        return RDBStorage(url, engine_kwargs=waits)
    except (SQLAlchemyError, ImportError, ValueError, RuntimeError) as exc:
        if sweep.storage is None:
            raise StorageInternalError(_first_line(exc)) from exc
        raise ConfigError(
            f"storage: {_safe(sweep, folder)}: cannot be opened: {_first_line(exc)}; expected a URL such as "
            "sqlite:///file.db, mysql+pymysql://user:$PASSWORD@host/database or postgresql+psycopg://.., with the "
            "driver it names installed"
        ) from exc


def sqlite_storage(path: Path) -> RDBStorage:
    """The storage in a SQLite file. Its path stands in no URL, where `?`, `#` or `%` would mean something else."""
    connect = partial(sqlite3.connect, path, timeout=_SQLITE_WAIT_S, check_same_thread=False)
    return RDBStorage(f"sqlite:///{_DATABASE_NAME}", engine_kwargs={"creator": connect})


def _safe(sweep: SweepConfig, folder: Path) -> str:
    """The storage without what it may hold of a password."""
    return str(folder / _DATABASE_NAME) if sweep.storage is None else sweep.storage.rpartition("@")[2]


def _first_line(exc: BaseException) -> str:
    return next(iter(str(exc).splitlines()), type(exc).__name__)


def _refuse_other_settings(name: str, folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [key for key in sorted(begun.keys() | now.keys()) if begun.get(key) != now.get(key)]
    if changed:
        lines = "\n".join(f"  {key}: was {begun.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise StaleError(
            f"{folder}: the sweep {name} was begun with other settings:\n{lines}\nset them back, give the sweep's file "
            "another name, or begin anew with --force"
        )


def _distribution(varied: Any) -> BaseDistribution:
    if not isinstance(varied, Range):
        return CategoricalDistribution([json.dumps(value) for value in varied])
    high = (varied.values() or [varied.high])[-1]  # Optuna wants a whole number of steps
    if varied.kind == "int":
        return IntDistribution(int(varied.low), int(high), log=varied.log, step=int(varied.step or 1))
    return FloatDistribution(varied.low, high, log=varied.log, step=varied.step)


def _pruner(sweep: SweepConfig) -> BasePruner:
    match sweep.pruning:
        case MedianPruning() as median:
            return MedianPruner(n_startup_trials=median.startup_trials, n_warmup_steps=median.warmup_steps)
        case HalvingPruning() as halving:
            return SuccessiveHalvingPruner(min_resource=halving.min_steps, reduction_factor=halving.factor)
    return NopPruner()


def _place(folder: Path) -> str:
    """What tells this sweep folder from one of the same name elsewhere; all who see the folder see its locks."""
    with held(folder):
        if _known_place(folder) is None:
            write_atomically(folder / _PLACE_NAME, uuid.uuid4().hex.encode())
        return _known_place(folder) or ""


def _known_place(folder: Path) -> str | None:
    path = folder / _PLACE_NAME
    return path.read_text(encoding="ascii", errors="backslashreplace") if path.is_file() else None


def _places_of_running(study: optuna.Study, own: str | None) -> list[str]:
    """Where trials run that are not of the own place."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    places = [trial.user_attrs for trial in running if trial.user_attrs.get("place") not in (None, own)]
    return sorted({str(attrs.get("where")) for attrs in places})
