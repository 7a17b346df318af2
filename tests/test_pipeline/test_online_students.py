"""Students that no cache taught, by the command line: their provenance, and who judges them."""

import json
import shutil
from pathlib import Path

import pytest
from small_run import small_config

from conftest import Outcome, tristill

STUDENTS = """
[variants.online.distill]
targets = "online"

[variants.beside.student]
model = { width = 16, layers = 1, heads = 2, mlp_width = 32 }

[variants.beside.distill]
targets = "online"
online = { co_train = true }
"""
PROFILE = '{ kind = "plain_topk", top_k = 8, temperature = 1.0 }'


def on(folder: Path, *arguments: str) -> Outcome:
    return tristill(*arguments, "--config", str(folder / "some.toml"), "--run-dir", str(folder / "run"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and its run: `online` was taught by the run's teacher, `beside` by one of its own. There is no cache."""
    folder = tmp_path_factory.mktemp("online")
    (folder / "some.toml").write_text(small_config(PROFILE) + STUDENTS)
    for command in (("tokenize",), ("teacher",), ("distill", "--name", "online"), ("distill", "--name", "beside")):
        outcome = on(folder, *command)
        assert outcome.code == 0, outcome.stderr
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "own")


def fingerprint(folder: Path, name: str) -> str:
    return str(json.loads((folder / "run" / "students" / name / "provenance.json").read_text())["fingerprint"])


@pytest.mark.parametrize("name", ["online", "beside"])
def test_what_a_cache_would_say_of_itself_is_a_setting_of_a_student_without_one(made: Path, name: str) -> None:
    changes = {
        "cache.max_train_windows=32": "distill.windows.max_train_windows: was 64, is 32",
        "cache.profile.temperature=2.0": "distill.windows.temperature: was 1.0, is 2.0",
        "cache.hidden.stride=2": "distill.windows.hidden_stride: was 1, is 2",
        "cache.shard_positions=2048": "distill.windows.shard_positions: was 131072, is 2048",
    }
    assignments = (part for change in changes for part in ("--set", change))
    outcome = on(made, "distill", "--name", name, *assignments)
    assert outcome.code == 1
    assert f"students/{name}: was made with other settings or inputs:" in outcome.stderr
    for message in changes.values():
        assert message in outcome.stderr
    assert f"`tristill distill --name {name} --force`" in outcome.stderr
    assert "up to date" in on(made, "distill", "--name", name, "--set", "cache.profile.top_k=9").stderr


def test_a_student_without_a_cache_is_made_anew_from_other_windows(own: Path) -> None:
    before, change = fingerprint(own, "online"), ("--set", "cache.max_train_windows=16")
    outcome = on(own, "distill", "--name", "online", *change, "--force")
    assert outcome.code == 0, outcome.stderr
    assert fingerprint(own, "online") != before
    assert "up to date" in on(own, "distill", "--name", "online", *change).stderr
    assert on(own, "distill", "--name", "online", "--force").code == 0
    assert fingerprint(own, "online") == before


def test_the_shape_of_a_co_trained_teacher_is_a_setting_of_its_student(made: Path) -> None:
    outcome = on(made, "distill", "--name", "beside", "--set", "teacher.model.mlp_width=48")
    assert outcome.code == 1
    assert "students/beside: was made with other settings or inputs:\n  co_teacher.mlp_width: was 64, is 48\n" in (
        outcome.stderr
    )
    # How the run's teacher is trained is nothing to a student that has one of its own.
    outcome = on(made, "distill", "--name", "beside", "--set", "teacher.training.steps=9")
    assert "up to date" in outcome.stderr


def test_a_student_is_judged_by_the_teacher_that_moved_with_it(own: Path) -> None:
    outcome = on(own, "evaluate", "online", "beside", "--json")
    assert outcome.code == 0, outcome.stderr
    metrics = json.loads(outcome.stdout)
    for name in ("online", "beside"):
        summary = json.loads((own / "run" / "students" / name / "summary.json").read_text())
        assert metrics[name] == summary["validation"] | {"basis": summary["basis"]}
    shutil.rmtree(own / "run" / "students" / "beside" / "co_teacher")
    by_the_runs = json.loads(on(own, "evaluate", "beside", "--json").stdout)["beside"]
    assert by_the_runs["loss_nats"] == metrics["beside"]["loss_nats"]
    difference = abs(by_the_runs["kl_to_teacher_nats"] - metrics["beside"]["kl_to_teacher_nats"])
    assert difference > 0.01 * metrics["beside"]["kl_to_teacher_nats"]
