"""SIGKILL at any point of any stage: the same command goes on, and ends with what an uninterrupted run ends with.

Two kinds of points, both seeded: right before the n-th change to the file system (or statement of a data base), which
hits every commit window in turn, and a time drawn uniformly from what the stage takes. Run with -s to see the counts.
"""

import itertools
import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from survival import STAGES, Runs, Stage, content

from tristill.pipeline.config import load_config
from tristill.pipeline.step import Step
from tristill.pipeline.steps import Distill, DumpLogits, Teacher
from tristill.pipeline.tokenize_step import Tokenize
from tristill.pipeline.workspace import Workspace

SEED = 7
RECORDS = {"provenance.json", "summary.json", "metrics.jsonl"}
MANY = [pytest.param(name, 60, marks=pytest.mark.slow) for name in STAGES]


@dataclass
class Count:
    """Kills of one stage. under_way: those after its first change to the run folder and before it was done."""

    stage: str
    kills: int = 0
    under_way: int = 0
    before_a_change: int = 0
    finished_runs: int = 0

    def tell(self) -> None:
        print(json.dumps(asdict(self)))


def killed(runs: Runs, run_dir: Path, stage: Stage, count: Count, *options: str, **how: Any) -> bool:
    """Whether the kill came before the end; what is left is looked at."""
    ended = runs.run(run_dir, *stage.arguments, *options, counts_sql=stage.has_study, **how)
    if not ended.was_killed:
        assert ended.code == 0, ended.stderr
        return False
    count.kills += 1
    count.before_a_change += "kill_before_change" in how
    count.under_way += ended.changes > 0 and not step_of(runs, run_dir, stage).is_complete()
    look_as_a_later_command(runs, run_dir, stage)
    return True


def finish(runs: Runs, run_dir: Path, stage: Stage, count: Count, *options: str) -> None:
    ended = runs.run(run_dir, *stage.arguments, *options)
    assert ended.code == 0, ended.stderr
    assert runs.final(run_dir, stage) == runs.final(runs.whole, stage)
    assert not list(run_dir.glob(".*")), "litter beside the artefacts"
    count.finished_runs += 1


class _Export(Step):
    """An export as a step: complete when its record says so."""

    def __init__(self, folder: Path, export_format: str) -> None:
        self._path = folder / ("student.gguf" if export_format == "gguf" else export_format)

    command, folder, needs, settings, build = "export", Path(), {}, dict, str  # type: ignore[assignment]

    def is_complete(self) -> bool:
        record = self._path.with_name(f"{self._path.name}.json")
        return record.exists() and json.loads(record.read_text())["status"] == "complete"


class _Sweep(_Export):
    """A sweep as a step: complete when its results have their ledger."""

    def __init__(self, folder: Path) -> None:
        self._path = folder

    def is_complete(self) -> bool:
        path = self._path / "results.json"
        return path.exists() and json.loads(path.read_text())["ledger"] is not None


def step_of(runs: Runs, run_dir: Path, stage: Stage) -> Step:
    workspace = Workspace(load_config(runs.config, ()), run_dir)
    match stage.arguments:
        case ["tokenize"]:
            return Tokenize(workspace)
        case ["teacher"]:
            return Teacher(workspace)
        case ["dump-logits"]:
            return DumpLogits(workspace)
        case ["distill"]:
            return Distill(workspace, "student")
        case ["sweep"]:
            return _Sweep(run_dir / stage.artefact)
        case _:
            return _Export(run_dir / stage.artefact, stage.arguments[-1])


def look_as_a_later_command(runs: Runs, run_dir: Path, stage: Stage) -> None:
    """What a kill has left is not taken for finished, unless it is."""
    found, whole = runs.final(run_dir, stage), runs.final(runs.whole, stage)
    if step_of(runs, run_dir, stage).is_complete():
        assert {name: found.get(name) for name in whole} == whole, "taken for finished, and is not"
    elif stage.guard:
        ended = runs.run(run_dir, *stage.guard)
        if ended.code == 0:  # all of it is there, but for its record
            made = whole.keys() - RECORDS
            assert {name: found.get(name) for name in made} == {name: whole[name] for name in made}
        else:
            assert ended.code == 1
            assert stage.refusal in ended.stderr, ended.stderr
    elif stage.has_study:
        for folder in (run_dir / stage.artefact / "students").glob("*"):
            record = folder / "provenance.json"
            if record.exists() and json.loads(record.read_text())["status"] == "complete":
                its, of_whole = content(folder), content(runs.whole / folder.relative_to(run_dir))
                assert {name: its.get(name) for name in of_whole} == of_whole
    else:
        final_names = {name: values for name, values in found.items() if name in whole and not name.endswith(".json")}
        assert all(values == whole[name] for name, values in final_names.items()), "a final name of something else"


@pytest.mark.parametrize(
    ("name", "num_kills"),
    [*((name, 5) for name in STAGES if name not in {"export gguf", "export bitnet"}), *MANY],
)
def test_a_stage_that_is_killed_again_and_again_ends_as_one_that_was_not(
    runs: Runs, tmp_path: Path, name: str, num_kills: int
) -> None:
    stage, count = STAGES[name], Count(name)
    generator = random.Random(f"{SEED} {name}")
    run_dir = tmp_path / "run"
    while count.kills < num_kills:
        runs.before(stage, run_dir)
        for _ in range(generator.randint(1, 4)):
            how: dict[str, Any] = {"kill_after_s": generator.uniform(0, 0.9 * runs.seconds[name])}
            if generator.random() < 0.6:
                how = {"kill_before_change": generator.randint(1, runs.changes[name])}
            if not killed(runs, run_dir, stage, count, **how):
                break
        finish(runs, run_dir, stage, count)
    count.tell()
    assert count.under_way > num_kills // 3


@pytest.mark.parametrize("name", ["teacher", "distill"])
def test_a_training_that_is_killed_before_its_record_says_complete_is_not_done_again(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    stage, count = STAGES[name], Count(name)
    run_dir = runs.before(stage, tmp_path / "run")
    for number in range(runs.changes[name], 0, -1):
        runs.before(stage, run_dir)
        assert killed(runs, run_dir, stage, count, kill_before_change=number)
        if not step_of(runs, run_dir, stage).is_complete():
            break
    assert (run_dir / stage.artefact / "summary.json").exists()
    again = runs.run(run_dir, *stage.arguments)
    assert again.code == 0, again.stderr
    assert 3 * again.changes < 2 * runs.changes[name], "it went on from its last checkpoint"
    assert runs.final(run_dir, stage) == runs.final(runs.whole, stage)


def test_what_an_unfinished_build_of_other_settings_left_is_not_taken_for_this_one(runs: Runs, tmp_path: Path) -> None:
    stage, count = STAGES["teacher"], Count("teacher")
    run_dir = runs.before(stage, tmp_path / "run")
    others = ("--set", "teacher.training.seed=5", "--set", "teacher.training.checkpoint_every=1000")
    for number in range(runs.changes["teacher"]):
        runs.run(run_dir, *stage.arguments, *others, kill_before_change=number + 1)
        if (run_dir / "teacher" / "model.safetensors").exists():
            break
    assert not step_of(runs, run_dir, stage).is_complete()
    ended = runs.run(run_dir, *stage.arguments, kill_before_change=runs.changes["teacher"] // 2)
    assert ended.was_killed
    assert not (run_dir / "teacher" / "model.safetensors").exists()
    finish(runs, run_dir, stage, count)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if not stage.has_study])
def test_a_kill_before_each_change_in_turn(runs: Runs, tmp_path: Path, name: str) -> None:
    stage, count = STAGES[name], Count(name)
    for number in itertools.count(1):
        run_dir = runs.before(stage, tmp_path / "run")
        was_killed = killed(runs, run_dir, stage, count, kill_before_change=number)
        finish(runs, run_dir, stage, count)
        if not was_killed:
            break
    count.tell()
    assert count.kills >= runs.changes[name] - 2, "all but the run folder's own"


@pytest.mark.parametrize("num_kills", [1, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if not name.startswith("export")])
def test_a_rebuild_that_is_killed_as_it_clears_or_later_ends_as_the_first_build(
    runs: Runs, tmp_path: Path, name: str, num_kills: int
) -> None:
    stage, count = STAGES[name], Count(f"{name} --force")
    generator = random.Random(f"{SEED} {name} force")
    for number in range(num_kills):
        run_dir = runs.before(stage, tmp_path / "run")
        shutil.copytree(runs.whole / stage.artefact, run_dir / stage.artefact)
        change = number + 2 if num_kills > 1 else generator.randint(2, 12)
        was_killed = killed(runs, run_dir, stage, count, "--force", kill_before_change=change)
        finish(runs, run_dir, stage, count)
        if not was_killed:
            break
    count.tell()
    assert count.kills >= min(num_kills, 15)


@pytest.mark.parametrize("name", [pytest.param("export gguf", marks=pytest.mark.slow), "export hf"])
def test_an_export_that_is_killed_as_it_replaces_another_leaves_the_old_one_or_the_new_one(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    stage, count = STAGES[name], Count(f"{name} again")
    for number in range(runs.changes[name] - 5, runs.changes[name] + 3):
        run_dir = runs.before(stage, tmp_path / "run")
        shutil.copytree(runs.whole / stage.artefact, run_dir / stage.artefact)
        killed(runs, run_dir, stage, count, kill_before_change=number)
        finish(runs, run_dir, stage, count)
    count.tell()
    assert count.kills > 3
