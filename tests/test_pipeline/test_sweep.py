"""A sweep trains every student once, whoever is killed, and says of each what its own summary says."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from conftest import ENVIRONMENT, ROOT, tristill
from tristill.pipeline.runner import build_held
from tristill.pipeline.sweep.config import load_sweep
from tristill.pipeline.sweep.results import SweepResults
from tristill.pipeline.sweep.run import PrunedError, run_sweep
from tristill.pipeline.sweep.student import Base
from tristill.pipeline.sweep.study import open_study
from tristill.stages.training.watch import Watch

CONFIG = ROOT / "configs" / "sweeps" / "test.toml"
SHORT = (
    "vary.distill.training.steps=[4]",
    "distill.training.warmup_steps=2",
    "distill.training.checkpoint_every=2",
    "distill.training.batch_windows=2",
)
TPE = 'search={kind="tpe", trials=2, startup_trials=1}'
ALPHAS = "vary.distill.alpha={low=0.1, high=0.9}"
Sweep = Callable[..., SweepResults]


def arguments_of(run_dir: Path, cache: Path, *changes: str) -> list[str]:
    given = (*SHORT, f"cache.dir={str(cache)!r}", *changes)
    return ["--config", str(CONFIG), "--run-dir", str(run_dir), *(part for one in given for part in ("--set", one))]


@pytest.fixture
def cache(finished_run: Path) -> Path:
    return finished_run / "cache"


@pytest.fixture
def sweep(cache: Path, tmp_path: Path) -> Sweep:
    """A sweep of the test config in this process."""

    def run(*changes: str, run_dir: Path = tmp_path / "run", **options: bool) -> SweepResults:
        found, of_base = load_sweep(CONFIG, (*SHORT, f"cache.dir={str(cache)!r}", *changes))
        return run_sweep(found, Base(found, CONFIG, of_base, run_dir), **options)

    return run


def start(run_dir: Path, cache: Path, *changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tristill.pipeline", "sweep", *arguments_of(run_dir, cache, *changes)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def but_for_time(results: SweepResults) -> dict[str, Any]:
    """All that must be equal: everything but seconds, speeds and memory."""
    plain = results.model_dump(mode="json", exclude={"ledger", "ledger_missing"})
    for trial in plain["trials"]:
        trial.pop("elapsed_s")
        for key in ("elapsed_s", "positions_per_s", "peak_rss_mib"):
            (trial["train"] or {}).pop(key, None)
    return plain


def read_results(run_dir: Path) -> SweepResults:
    return SweepResults.model_validate_json((run_dir / "sweeps" / "test" / "results.json").read_bytes())


def trained_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_grid_trains_every_combination_with_every_seed_and_reports_what_the_students_say(
    sweep: Sweep, cache: Path, finished_run: Path, tmp_path: Path
) -> None:
    for name in ("data", "teacher"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).symlink_to(finished_run / name)
    results = sweep("vary.distill.temperature={low=1.0, high=2.5, step=1.0}", "vary.distill.alpha=[0.2]")
    run_dir = tmp_path / "run"
    assert read_results(run_dir) == results
    alphas = [(t.parameters["distill.temperature"], t.parameters["distill.training.seed"]) for t in results.trials]
    assert alphas == [(1.0, 0), (1.0, 1), (2.0, 0), (2.0, 1)]
    fingerprint = json.loads((cache / "provenance.json").read_text())["fingerprint"]
    rows = list(csv.DictReader((run_dir / "sweeps" / "test" / "results.csv").read_text().splitlines()))
    for trial, row in zip(results.trials, rows, strict=True):
        assert trial.folder is not None
        summary = json.loads((run_dir / trial.folder / "summary.json").read_text())
        assert (trial.validation, trial.train, trial.model) == tuple(
            summary[key] for key in ("validation", "train", "model")
        )
        assert trial.value == summary["validation"]["perplexity"] == float(row["validation.perplexity"])
        assert trial.cache_fingerprint == row["cache_fingerprint"] == summary["fingerprints"]["cache"] == fingerprint
        assert float(row["distill.temperature"]) == trial.parameters["distill.temperature"]
        assert int(row["train.positions"]) == summary["train"]["positions"]
        assert trial.elapsed_s is not None
        assert trial.elapsed_s >= summary["train"]["elapsed_s"]
    for group, first in zip(results.groups, (0, 2), strict=True):
        values = [results.trials[number].value or 0 for number in (first, first + 1)]
        assert group.mean == pytest.approx(sum(values) / 2)
        assert group.deviation == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    best = min(results.groups, key=lambda group: group.mean)
    assert results.best == min(best.trials, key=lambda number: results.trials[number].value or 0)
    assert results.ledger is not None
    assert results.ledger.num_students == 4
    taught = json.loads((finished_run / "teacher" / "summary.json").read_text())["train"]
    assert (results.ledger.teacher_s, results.ledger.teacher_steps) == (taught["elapsed_s"], ("teacher",))
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "sweeps" / "test" / "students").rglob("*")}
    assert sweep("vary.distill.temperature={low=1.0, high=2.5, step=1.0}", "vary.distill.alpha=[0.2]") == results, (
        "nothing is done again"
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_student_of_a_sweep_is_the_one_that_distill_trains(sweep: Sweep, cache: Path, tmp_path: Path) -> None:
    results = sweep(
        "vary.distill.alpha=[0.3]", "vary.student.model.layers=[1]", "distill.hidden.layers={1=2}", "seeds=[5]"
    )
    alike = ("distill.alpha=0.3", "distill.training.seed=5", "distill.hidden.layers={1=2}", f"cache.dir={str(cache)!r}",
             "student.model={width=32, layers=1, heads=2, mlp_width=64}", "distill.training.steps=4",
             "distill.training.warmup_steps=2", "distill.training.batch_windows=2")  # fmt: skip
    changes = [part for one in alike for part in ("--set", one)]
    own = ("--config", "configs/test.toml", "--run-dir", str(tmp_path / "own"))
    assert tristill("distill", "--targets", "cached", *own, *changes).code == 0
    folder = tmp_path / "run" / str(results.trials[0].folder)
    alone = tmp_path / "own" / "students" / "student"
    assert (folder / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


def test_a_sweep_that_was_killed_ends_as_the_one_that_was_not(sweep: Sweep, cache: Path, tmp_path: Path) -> None:
    median = 'pruning={kind="median", every=9, windows=16, startup_trials=2}'
    changes = ("vary.distill.training.steps=[40]", ALPHAS, TPE, median)
    killed = tmp_path / "killed"
    process = start(killed, cache, *changes)
    students = killed / "sweeps" / "test" / "students"
    while process.poll() is None and len(list(students.glob("*/summary.json"))) < 1:
        time.sleep(0.002)
    finished = {path: path.stat().st_mtime_ns for path in students.glob("*/model.safetensors")}
    done = {path.parent for path in finished}
    while process.poll() is None and not {p.parents[1] for p in students.glob("*/checkpoints/step-*")} - done:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was faster than the test"
    resumed = [path.parent.parent for path in students.glob("*/checkpoints/step-*")]
    assert resumed
    after = sweep(*changes, run_dir=killed)
    whole = sweep(*changes, run_dir=tmp_path / "whole")
    assert but_for_time(after) == but_for_time(whole)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "what was finished is kept"
    assert [trial.state for trial in whole.trials[:2]] == ["complete"] * 2
    for trial in whole.trials:
        if trial.state == "pruned":
            continue
        weights = [
            (tmp_path / name / str(trial.folder) / "model.safetensors").read_bytes() for name in ("killed", "whole")
        ]
        assert weights[0] == weights[1]
    assert all(not list((killed / str(trial.folder)).glob("checkpoints")) for trial in after.trials)


def test_two_processes_share_a_study_and_train_no_student_twice(cache: Path, tmp_path: Path) -> None:
    changes = (
        "vary.distill.alpha=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]",  # enough for one that starts seconds after the other
        "vary.distill.training.steps=[40]",
    )
    processes = [start(tmp_path, cache, *changes) for _ in range(2)]
    errors = []
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        errors.append(stderr)
    lines = [[line for line in stderr.splitlines() if "done: trial" in line] for stderr in errors]
    numbers = Counter(int(line.split("trial ")[1].split(",")[0]) for own in lines for line in own)
    assert numbers == Counter(range(12)), "each trial is told of once"
    assert all(lines), "each process trained some"
    results = read_results(tmp_path)
    assert [trial.state for trial in results.trials] == ["complete"] * 12
    assert all(trained_steps(tmp_path / str(trial.folder)) == [1, 10, 20, 30, 40] for trial in results.trials)


def test_random_points_are_a_function_of_the_seed_and_a_larger_budget_adds_to_them(
    sweep: Sweep, tmp_path: Path
) -> None:
    lr = "vary.distill.training.learning_rate={low=1e-3, high=1e-2, log=true}"
    drawn = ('search={kind="random", trials=1, seed=3}', ALPHAS, lr, "seeds=[]")
    first = sweep(*drawn)
    more = sweep(*(change.replace("trials=1", "trials=2") for change in drawn))
    again = sweep(*(change.replace("trials=1", "trials=2") for change in drawn), run_dir=tmp_path / "again")
    points = [[trial.parameters for trial in results.trials] for results in (first, more, again)]
    assert points[0] == points[1][:1]
    assert points[1] == points[2]
    assert points[1][0]["distill.alpha"] != points[1][1]["distill.alpha"]
    assert all(0.1 <= point["distill.alpha"] <= 0.9 for point in points[1])
    assert all(1e-3 <= point["distill.training.learning_rate"] <= 1e-2 for point in points[1])
    assert but_for_time(more) == but_for_time(again)


def test_tpe_draws_where_students_did_well(sweep: Sweep) -> None:
    alphas = "vary.distill.alpha={low=0.0, high=1.0}"
    results = sweep('search={kind="tpe", trials=8, startup_trials=3}', alphas, "seeds=[]")
    tried = [trial.parameters["distill.alpha"] for trial in results.trials]
    assert len(set(tried)) == 8
    by_value = sorted(results.trials[:3], key=lambda trial: trial.value or 0)
    best, *_, worst = [trial.parameters["distill.alpha"] for trial in by_value]
    assert sum(abs(alpha - best) < abs(alpha - worst) for alpha in tried[3:]) >= 4, (
        "most are near the best of the first"
    )


def test_a_point_that_is_drawn_again_is_trained_once(sweep: Sweep, tmp_path: Path) -> None:
    results = sweep('search={kind="random", trials=6}', "vary.distill.alpha=[0.2, 0.8]", "seeds=[]")
    assert sorted(trial.parameters["distill.alpha"] for trial in results.trials) == [0.2, 0.8]
    assert len(list((tmp_path / "run" / "sweeps" / "test" / "students").iterdir())) == 2
    assert results.ledger is None
    assert "teacher: online targets need it, and config.json is not there" in str(results.ledger_missing)


def test_pruning_ends_bad_students_and_their_folders_are_no_students(sweep: Sweep, cache: Path, tmp_path: Path) -> None:
    """Learning rates from good to useless, in an order that the first ones set the measure."""
    common = ("vary.distill.training.steps=[20]", "vary.distill.alpha=[0.5]", "seeds=[]")
    rates = "vary.distill.training.learning_rate=[3e-3, 2e-3, 1e-7]"
    median = 'pruning={kind="median", every=5, windows=8, startup_trials=2}'
    pruned = sweep(*common, rates, median, run_dir=tmp_path / "pruned")
    assert [trial.state for trial in pruned.trials] == ["complete", "complete", "pruned"]
    assert pruned.best in {0, 1}
    assert [[step for step, _ in trial.looks] for trial in pruned.trials] == [[5, 10, 15], [5, 10, 15], [5]]
    ended = pruned.trials[2]
    folder = tmp_path / "pruned" / str(ended.folder)
    assert (ended.value, ended.validation, ended.train) == (None, None, None)
    assert not (folder / "summary.json").exists()
    assert not (folder / "checkpoints").exists()
    assert json.loads((folder / "provenance.json").read_text())["status"] == "building"
    rates = "vary.distill.training.learning_rate=[3e-3, 1e-7]"
    halving = 'pruning={kind="successive_halving", every=5, windows=8, min_steps=10, factor=2}'
    halved = sweep(*common, rates, halving, run_dir=tmp_path / "halved")
    assert [trial.state for trial in halved.trials] == ["complete", "pruned"]
    assert [step for step, _ in halved.trials[1].looks] == [5, 10]


def test_an_ended_student_can_be_trained_to_its_end(cache: Path, tmp_path: Path) -> None:
    found, of_base = load_sweep(CONFIG, (*SHORT, f"cache.dir={str(cache)!r}"))
    base = Base(found, CONFIG, of_base, tmp_path)

    parameters = {"distill.alpha": 0.3, "distill.training.steps": 4}

    def give_up(step: int, metrics: dict[str, float | None]) -> None:
        raise PrunedError

    step = base.student(parameters)
    step.folder.mkdir(parents=True)
    step.watch = Watch(3, 1, give_up)
    with pytest.raises(PrunedError):
        build_held(step)
    assert not step.is_complete()
    again = base.student(parameters)
    build_held(again)
    ended = (again.folder / "model.safetensors").read_bytes()
    shutil.rmtree(again.folder)
    again.folder.mkdir()
    build_held(base.student(parameters))
    assert (again.folder / "model.safetensors").read_bytes() == ended


def test_a_student_that_cannot_be_trained_fails_alone_and_says_why(sweep: Sweep) -> None:
    results = sweep("vary.distill.training.learning_rate=[1e30, 3e-3]", "vary.distill.alpha=[0.5]", "seeds=[]")
    assert [trial.state for trial in results.trials] == ["failed", "complete"]
    assert "lower learning_rate" in str(results.trials[0].reason)
    assert results.best == 1


def test_further_seeds_are_added_and_other_settings_are_refused_until_forced(sweep: Sweep, tmp_path: Path) -> None:
    first = sweep("vary.distill.alpha=[0.2]", "seeds=[0]")
    more = sweep("vary.distill.alpha=[0.2]", "seeds=[0, 3]")
    assert more.trials[0] == first.trials[0]
    assert sweep("vary.distill.alpha=[0.2]", "seeds=[0, 3]", "distill.alpha=0.9").trials == more.trials, "it is varied"
    assert [trial.parameters["distill.training.seed"] for trial in more.trials] == [0, 3]
    for change, line in (
        ("vary.distill.alpha=[0.2, 0.4]", r"vary\.distill\.alpha: was \[0\.2\], is \[0\.2, 0\.4\]"),
        ("metric=validation.kl_to_teacher_nats", "metric: was 'validation.perplexity', is 'validation.kl_to_teacher"),
        ("distill.training.batch_windows=4", r"distill\.training\.batch_windows: was 2, is 4"),
    ):
        with pytest.raises(Exception, match=line):
            sweep("vary.distill.alpha=[0.2]", "seeds=[0]", change)
    changed = ("vary.distill.alpha=[0.4]", "seeds=[0]")
    anew = sweep(*changed, force=True)
    assert [trial.parameters["distill.alpha"] for trial in anew.trials] == [0.4]
    assert len(list((tmp_path / "run" / "sweeps" / "test" / "students").iterdir())) == 1


def test_a_storage_is_shared_by_run_folders_and_running_trials_elsewhere_are_left_alone(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDY_FOLDER", str(tmp_path))

    shared = ("storage=sqlite:///$STUDY_FOLDER/shared.db", "vary.distill.alpha=[0.2, 0.4]", "seeds=[]")
    first = sweep(*shared, run_dir=tmp_path / "one")
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{tmp_path}/shared.db")
    study.enqueue_trial({}, user_attrs={"parameters": {"distill.alpha": 0.2, "distill.training.steps": 4, "x": 1}})
    study.ask().set_user_attr("place", "of another machine")
    capsys.readouterr()
    second = sweep(*shared, run_dir=tmp_path / "two")
    assert [trial.validation for trial in second.trials[:2]] == [trial.validation for trial in first.trials]
    assert [trial.folder for trial in second.trials[:2]] == [None, None], "they are in the other folder"
    assert second.trials[2].state == "running"
    assert "run the same command with --take-over" in capsys.readouterr().err


def test_a_trial_that_ended_after_it_was_looked_up_is_not_taken_again(tmp_path: Path) -> None:
    found, _ = load_sweep(CONFIG, ())
    with open_study(found, "test", tmp_path, {}, take_over=False) as one:
        trial = one.next()
        assert trial is not None
        assert one.take(trial) == {
            "distill.alpha": 0.2,
            "distill.training.steps": 12,
            "distill.training.seed": 0,
        }
        with open_study(found, "test", tmp_path, {}, take_over=False) as other:
            (seen,) = other.abandoned()
            assert other.is_running(seen)
            one.study.tell(trial, 1.0)
            assert not other.is_running(seen)
            assert other.abandoned() == []


def test_trials_of_another_place_are_not_abandoned_unless_they_are_to_be_taken_over(tmp_path: Path) -> None:
    found, _ = load_sweep(CONFIG, (f"storage=sqlite:///{tmp_path}/shared.db",))
    with (
        open_study(found, "test", tmp_path / "one", {}, take_over=False) as one,
        open_study(found, "test", tmp_path / "two", {}, take_over=False) as two,
        open_study(found, "test", tmp_path / "two", {}, take_over=True) as bold,
    ):
        trial = one.next()
        assert trial is not None
        one.take(trial)
        assert [len(study.abandoned()) for study in (one, two, bold)] == [1, 0, 1]
        assert [place.endswith("one") for place in two.elsewhere()] == [True]
        assert one.elsewhere() == []
