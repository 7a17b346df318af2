"""A plan says beforehand what happens, touches nothing, and leaves nothing."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ENVIRONMENT, ROOT, Outcome, tristill
from tristill.pipeline.config import load_config
from tristill.pipeline.errors import StaleError
from tristill.pipeline.plan.bounds import affordable_positions
from tristill.pipeline.plan.compare import Comparison, compare
from tristill.pipeline.plan.in_small import in_small
from tristill.pipeline.plan.planning import SAMPLE_POSITIONS
from tristill.pipeline.plan.prediction import PLAN_NAME, CachePrediction, Plan, load_plan
from tristill.pipeline.plan.sizes import cache_sizes, extrapolated, scaled
from tristill.pipeline.plan.text import disk_lines, plan_text
from tristill.pipeline.workspace import Workspace

TEST = ROOT / "configs" / "test.toml"
QUICK = ("--seconds", "0.5")


def plan(run_dir: Path, *arguments: str) -> Outcome:
    return tristill("plan", *QUICK, "--config", str(TEST), "--run-dir", str(run_dir), *arguments)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def planned(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the plan that was made of it where nothing was there."""
    fresh = tmp_path_factory.mktemp("fresh") / "run"
    outcome = plan(fresh, "--json")
    assert outcome.code == 0, outcome.stderr
    assert [path.name for path in fresh.iterdir()] == [PLAN_NAME]
    assert Plan.model_validate_json(outcome.stdout) == load_plan(fresh)
    again = plan(fresh, "--json")
    assert "as measured before; delete" in again.stderr
    assert again.stdout == outcome.stdout
    copy = tmp_path_factory.mktemp("planned") / "run"
    shutil.copytree(finished_run, copy)
    shutil.copy(fresh / PLAN_NAME, copy)
    return copy


def test_what_was_planned_before_anything_was_there_is_what_happens(planned: Path) -> None:
    rows = compare(Workspace(load_config(TEST), planned))
    labels = ("tokenize", "teacher", "dump-logits", "distill --name student", "distill --name no-teacher")
    assert list(dict.fromkeys(row.what.split(": ")[0] for row in rows)) == list(labels)
    exact = [row for row in rows if row.unit == "positions"]
    assert len(exact) == 6
    assert [row.predicted for row in exact] == [row.happened for row in exact]
    sizes = {row.what: row for row in rows if row.unit == "bytes"}
    assert {"dump-logits: target", "dump-logits: tables.h5", "dump-logits: all files"} <= sizes.keys()
    for row in sizes.values():
        assert row.happened == pytest.approx(row.predicted, rel=0.01), row  # the teacher was rehearsed to its end
    predicted = load_plan(planned)
    assert predicted is not None
    refused = {stage.step: stage.refused_exports for stage in predicted.stages if stage.refused_exports}
    assert list(refused) == ["distill --name student", "distill --name no-teacher"]
    assert (
        "export --format gguf` will refuse it: a GGUF file of ternary blocks cannot hold"
        in refused["distill --name student"]
    )
    assert f"warning: distill --name student: {refused['distill --name student']}" in plan_text(predicted)
    memory = [row for row in rows if row.unit == "MiB"]
    assert len(memory) == 5
    for row in memory:
        assert row.happened == pytest.approx(row.predicted, rel=0.25), row
    times = [row for row in rows if row.unit == "s"]
    assert len(times) == 5
    for row in times:  # of two sittings on a machine that does other work too
        assert 0.1 < row.ratio < 10, row


def test_a_finished_run_is_shown_as_done_beside_what_was_predicted_of_it(planned: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(planned, copy)
    before, predicted = content(copy), load_plan(copy)
    outcome = plan(copy)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.count("| done ") == 5
    assert "| all that is to be done " in outcome.stdout
    assert "| dump-logits: all files " in outcome.stdout
    after, found = content(copy), load_plan(copy)
    assert {name for name in after if after[name] != before.get(name)} == {PLAN_NAME}
    assert before.keys() == after.keys()
    assert predicted is not None
    assert found is not None
    assert all(stage.is_done for stage in found.stages)
    assert [stage.elapsed_s for stage in found.stages] == [stage.elapsed_s for stage in predicted.stages]
    assert found.cache == predicted.cache


def test_a_plan_of_other_settings_is_compared_with_nothing(planned: Path) -> None:
    changed = load_config(TEST, ("distill.alpha=0.3",))
    with pytest.raises(StaleError, match=r"was made for other settings .*; run `tristill plan` again"):
        compare(Workspace(changed, planned))
    neutral = load_config(TEST, ("teacher.training.log_every=7",))
    assert compare(Workspace(neutral, planned)) == compare(Workspace(load_config(TEST), planned))
    assert compare(Workspace(changed, planned / "nowhere")) == []


def test_a_large_teacher_is_forwarded_over_as_few_positions_as_some_seconds_allow(tmp_path: Path) -> None:
    small = load_config(TEST)
    assert affordable_positions(Workspace(small, tmp_path), 300, 5.0) > SAMPLE_POSITIONS
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "config.json").write_text("{}")
    with (tmp_path / "given" / "model.safetensors").open("wb") as file:
        file.truncate(538_090_408)  # as of SmolLM2-135M, in float32
    given = Workspace(load_config(TEST, (f'teacher.path="{tmp_path / "given"}"',)), tmp_path / "run")
    found = affordable_positions(given, 49_152, 5.0)
    assert 500 < found < SAMPLE_POSITIONS
    assert affordable_positions(given, 49_152, 10.0) == pytest.approx(2 * found, abs=1)


def test_an_interrupted_plan_leaves_nothing(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [
        sys.executable,
        "-m",
        "tristill.pipeline",
        "plan",
        "--config",
        str(TEST),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    with subprocess.Popen(command, cwd=ROOT, env={**ENVIRONMENT, "TMPDIR": str(scratch)}, stderr=-1) as process:
        deadline = time.monotonic() + 120
        while not list(scratch.glob("*/request.json")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (inside,) = scratch.iterdir()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert list(tmp_path.iterdir()) == [scratch]
    assert not list(scratch.iterdir())
    assert not [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if str(inside) in _text(entry)]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_what_a_step_refuses_is_refused_by_its_plan(copied_run: Path) -> None:
    shutil.rmtree(copied_run / "students")
    before = content(copied_run)
    outcome = plan(copied_run, "--set", "distill.hidden.layers={1=9}", "--set", "distill.targets=cached")
    assert outcome.code == 1
    assert "error: distill --name student: cannot be planned, since its rehearsal was refused: " in outcome.stderr
    assert "hidden states of layers [9] are asked for" in outcome.stderr
    assert content(copied_run) == before
    outcome = plan(copied_run, "--set", "teacher.training.learning_rate=0.5")
    assert outcome.code == 1
    assert "teacher.training.learning_rate: was 0.003, is 0.5" in outcome.stderr


def test_a_data_set_of_unknown_size_is_not_guessed(tmp_path: Path) -> None:
    config = tmp_path / "unlimited.toml"
    lines = [line for line in TEST.read_text().splitlines() if not line.startswith(("max_", "source"))]
    config.write_text("\n".join(lines).replace("[data]", "[data]\nsource = { kind = 'hf', path = 'json' }", 1))
    outcome = tristill("plan", "--config", str(config), "--run-dir", str(tmp_path / "run"))
    assert outcome.code == 1
    assert "found nothing that says how much text there is; set data.max_train_tokens" in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_a_broken_plan_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / PLAN_NAME).write_text("{}")
    outcome = plan(tmp_path)
    assert outcome.code == 1
    assert f"{PLAN_NAME}: cannot be read as a plan; delete it" in outcome.stderr


def test_a_cache_is_scaled_by_split_and_a_whole_one_is_itself(finished_run: Path) -> None:
    found = cache_sizes(finished_run / "cache", "")
    on_disk = sum(path.stat().st_size for path in (finished_run / "cache").iterdir() if path.name != "provenance.json")
    assert found.total_bytes == on_disk
    again = scaled(finished_run / "cache", found.positions, "")
    assert again.dataset_bytes == pytest.approx(found.dataset_bytes)
    assert again.total_bytes == pytest.approx(found.total_bytes)
    double = scaled(finished_run / "cache", {split: 2 * count for split, count in found.positions.items()}, "")
    assert double.dataset_bytes["target"] == pytest.approx(2 * found.dataset_bytes["target"])
    assert double.dataset_bytes["tables.h5"] == found.dataset_bytes["tables.h5"]
    assert double.total_bytes < 2 * found.total_bytes


def test_bytes_of_an_older_teacher_lie_on_the_line_through_two_ages() -> None:
    young, old = (
        CachePrediction(
            positions={"train": 10}, dataset_bytes={"target": each, "ids": 5.0}, total_bytes=each + 9, basis=""
        )
        for each in (10.0, 14.0)
    )
    found = extrapolated(young, old, (100, 200), 400)
    assert (found.dataset_bytes, found.total_bytes) == ({"target": 18.0, "ids": 5.0}, 27.0)
    assert found.basis == "from teachers of 100 and 200 steps to one of 400"
    far = extrapolated(young, old, (100, 200), 200 * 2**10)
    assert far.dataset_bytes["target"] == 22.0
    assert "too far for more than a guess" in far.basis


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.toml")), ids=lambda path: path.stem)
def test_every_config_has_a_small_one_of_the_same_steps(path: Path) -> None:
    config = load_config(path)
    small = in_small(config, 5)
    assert in_small(config, None).teacher == config.teacher
    assert (small.teacher.model, small.data, small.student) == (config.teacher.model, config.data, config.student)
    for name in (*config.link_names, *config.variants):
        training = small.for_student(name).distill.training
        assert training.steps == 5
        assert training.batch_windows == config.for_student(name).distill.training.batch_windows
        assert small.for_student(name).cache.profile == config.for_student(name).cache.profile


def test_changes_of_a_variant_are_made_small_too(tmp_path: Path) -> None:
    text = TEST.read_text() + (
        "\n[variants.slow.distill.training]\nsteps = 30\nwarmup_steps = 20\nbatch_windows = 4\n"
        "[variants.warm.student.quantize]\nwarmup = { kind = 'linear', steps = 9 }\n"
    )
    (tmp_path / "config.toml").write_text(text)
    small = in_small(load_config(tmp_path / "config.toml"), 5)
    slow = small.for_student("slow").distill.training
    assert (slow.steps, slow.warmup_steps, slow.batch_windows) == (5, 0, 4)
    assert small.for_student("warm").student.quantize.warmup is None


def test_a_disk_that_is_too_small_is_said() -> None:
    lines = list(disk_lines({"runs/a": 2.0**31, "caches": 2.0**20}, {"runs/a": 2.0**30, "caches": 2.0**30}))
    assert lines[0].endswith("needs 2 GiB at most at once, 1 GiB are free: NOT ENOUGH, free some, or use another place")
    assert lines[1].endswith("1 GiB are free")


def test_what_took_something_though_nothing_was_predicted_took_infinitely_more() -> None:
    assert Comparison("a", "s", 0.0, 2.0).ratio == float("inf")
    assert json.loads(json.dumps(Comparison("a", "s", 4.0, 2.0).ratio)) == 0.5
