"""What a sweep found: `sweeps/NAME/results.json`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Trial(BaseModel):
    """One student. parameters: dotted keys of the config that the sweep sets. value: the metric, once it is finished.

    validation, train and model are those of the student's `summary.json`; None while it is not finished. elapsed_s: of
    its training, evaluation and saving, over all times it was resumed. folder: within the run's folder; None of a
    student that was trained elsewhere. looks: what pruning saw, steps done and the metric on a few windows; None where
    it was not finite.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    state: Literal["complete", "pruned", "failed", "running", "waiting"]
    parameters: dict[str, Any]
    value: float | None
    validation: dict[str, Any] | None
    train: dict[str, Any] | None
    model: dict[str, Any] | None
    cache_fingerprint: str
    folder: str | None
    elapsed_s: float | None
    reason: str | None = None
    looks: tuple[tuple[int, float | None], ...] = ()


class SeedGroup(BaseModel):
    """Finished students that differ in their seed only; deviation is that of a sample, None of one student.

    num_seeds: with how many seeds its point is to be trained, those that were ended or failed among them; None in
    results that were written before it was kept.
    """

    model_config = ConfigDict(frozen=True)

    parameters: dict[str, Any]
    trials: tuple[int, ...]
    mean: float
    deviation: float | None
    num_seeds: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all of its seeds are finished: a mean over survivors alone says too much."""
        return self.num_seeds is None or len(self.trials) >= self.num_seeds

    @property
    def seeds_text(self) -> str:
        """How many seeds the mean is of."""
        return str(len(self.trials)) if self.is_whole else f"{len(self.trials)} of {self.num_seeds}"


class Ledger(BaseModel):
    """What the sweep cost beside what it would have cost with the teacher forwarded online; seconds on this machine.

    step_s: medians of a short probe, cached and online steps of the base's student in turns in one process, on the same
    windows; online_over_cached: median, least and most of the ratio of a pair. The teacher's training is paid either
    way and is in no total: offline_total_s = dump_s + students_s, and online_total_s = students_s and the difference of
    the two steps, by position, for every position that was trained. break_even_students: how many students of the
    sweep's mean length pay for the dump; None if an online step is no dearer than a cached one.

    teacher_s: of the steps in teacher_steps, which made the cache's teacher here: in a chain more than one; None if
    there are none whose time is known. is_teacher_given: its weights, or those of a chain's first teacher, were made
    elsewhere. num_other_teachers: those of an ensemble beside it, whose training is not counted. at_least: which of
    teacher_s and dump_s leave out seconds of a process that was killed.
    """

    model_config = ConfigDict(frozen=True)

    teacher_s: float | None
    dump_s: float
    cache_bytes: int
    num_students: int
    students_s: float
    cached_step_s: float
    online_step_s: float
    online_over_cached: tuple[float, float, float]
    offline_total_s: float
    online_total_s: float
    break_even_students: float | None
    teacher_steps: tuple[str, ...] = ()
    is_teacher_given: bool = False
    num_other_teachers: int = 0
    at_least: tuple[Literal["teacher_s", "dump_s"], ...] = ()


class SweepResults(BaseModel):
    """Everything that a sweep has found so far.

    best: the best student of the group with the best mean, among groups with all their seeds if there is one.
    ledger_missing: why there is no ledger.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    cache_fingerprint: str
    metric: str
    direction: Literal["minimize", "maximize"] = "minimize"
    varied: tuple[str, ...]
    trials: tuple[Trial, ...]
    groups: tuple[SeedGroup, ...]
    best: int | None
    ledger: Ledger | None
    ledger_missing: str | None = None
