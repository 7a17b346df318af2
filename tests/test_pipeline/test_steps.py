"""Steps are skipped, resumed or refused by what is on disk; nothing of a user's is lost."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT, Outcome, tristill

CONFIG = ("--config", "configs/test.toml")
Snapshot = dict[str, tuple[int, bytes]]


def snapshot(folder: Path) -> Snapshot:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def on(run_dir: Path, *arguments: str) -> Outcome:
    return tristill(*arguments, *CONFIG, "--run-dir", str(run_dir))


def test_a_finished_step_is_up_to_date_and_touches_nothing(copied_run: Path) -> None:
    before = snapshot(copied_run)
    for command in ("tokenize", "teacher", "dump-logits", "distill"):
        outcome = on(copied_run, command)
        assert outcome.code == 0
        assert "up to date" in outcome.stderr
    assert on(copied_run, "run", "--dry-run").stdout == "nothing to do\n"
    assert snapshot(copied_run) == before


def test_changed_settings_are_refused_by_name_until_forced(copied_run: Path) -> None:
    before = snapshot(copied_run)
    change = ("--set", "teacher.training.learning_rate=0.002")
    for command in ("teacher", "run"):
        outcome = on(copied_run, command, *change)
        assert outcome.code == 1
        assert "was made with other settings or inputs:" in outcome.stderr
        assert "teacher.training.learning_rate: was 0.003, is 0.002" in outcome.stderr
        assert "`tristill teacher --force`" in outcome.stderr
    assert snapshot(copied_run) == before
    (copied_run / "teacher" / "tensorboard").mkdir()
    assert on(copied_run, "teacher", *change, "--force").code == 0
    assert not (copied_run / "teacher" / "tensorboard").exists()
    outcome = on(copied_run, "dump-logits", *change)
    assert outcome.code == 1
    assert "input teacher: was " in outcome.stderr


def test_settings_that_change_no_number_make_nothing_stale(copied_run: Path) -> None:
    neutral = ("teacher.training.log_every=7", "distill.targets=cached", "evaluate.calibration_bins=3")
    outcome = on(copied_run, "run", "--dry-run", *(part for change in neutral for part in ("--set", change)))
    assert (outcome.code, outcome.stdout) == (0, "nothing to do\n")


def test_cached_and_online_students_are_told_apart(copied_run: Path) -> None:
    outcome = on(copied_run, "distill", "--targets", "online")
    assert outcome.code == 1
    assert "distill.targets: was 'cached', is 'online'" in outcome.stderr
    shutil.rmtree(copied_run / "cache")
    assert "up to date" in on(copied_run, "distill").stderr


@pytest.mark.parametrize(
    ("command", "bad", "message"),
    [
        ("tokenize", "data.source={kind='text', paths=['nowhere']}", "found no file there"),
        ("teacher", "teacher.training.device=gpu", "device 'gpu': cannot be used here"),
        ("dump-logits", "cache.hidden_layers=[9]", "found [9], but the teacher has 2 blocks"),
        ("distill", "distill.hidden.layers={2=0}", "hidden states of layers [0] are asked for"),
        ("distill", "distill.hidden.layers={1=9}", "found teacher layers [9], but of the teacher there are [1, 2]"),
    ],
)
def test_a_refused_start_does_not_stand_in_the_way_of_the_right_one(
    finished_run: Path, tmp_path: Path, command: str, bad: str, message: str
) -> None:
    needed = {"tokenize": (), "teacher": ("data",), "dump-logits": ("data", "teacher")}
    for folder in needed.get(command, ("data", "teacher", "cache")):
        shutil.copytree(finished_run / folder, tmp_path / folder)
    targets = ("--targets", "online") if "1=9" in bad else ("--targets", "cached") if command == "distill" else ()
    outcome = on(tmp_path, command, "--set", bad, *targets)
    assert outcome.code == 1
    assert message in outcome.stderr
    assert on(tmp_path, command).code == 0


def test_steps_refuse_to_build_on_what_is_stale(copied_run: Path) -> None:
    shutil.rmtree(copied_run / "cache")
    assert on(copied_run, "tokenize", "--force", "--set", "data.validation_fraction=0.3").code == 0
    outcome = on(copied_run, "dump-logits", "--set", "data.validation_fraction=0.3")
    assert outcome.code == 1
    assert "teacher: was made with other settings or inputs:" in outcome.stderr
    assert "input data: was" in outcome.stderr


def test_force_never_removes_another_steps_files(copied_run: Path) -> None:
    before = snapshot(copied_run)
    outcome = on(copied_run, "dump-logits", "--force", "--set", f"cache.dir={copied_run / 'teacher'}")
    assert outcome.code == 1
    assert "was made by `tristill teacher`, not by `tristill dump-logits`" in outcome.stderr
    assert snapshot(copied_run) == before


def test_a_broken_record_is_refused_until_forced(copied_run: Path) -> None:
    (copied_run / "teacher" / "provenance.json").write_text("{")
    outcome = on(copied_run, "teacher")
    assert outcome.code == 1
    assert "provenance.json: cannot be read as a record of provenance" in outcome.stderr
    assert on(copied_run, "teacher", "--force").code == 0


def test_a_cache_without_its_record_is_as_good(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "cache", tmp_path / "cache")
    (tmp_path / "cache" / "provenance.json").unlink()
    assert on(tmp_path, "run", "--dry-run").stdout.startswith("distill --name student\n")
    assert on(tmp_path, "distill").code == 0
    fingerprints = json.loads((tmp_path / "students" / "student" / "summary.json").read_text())["fingerprints"]
    made = json.loads((finished_run / "students" / "student" / "summary.json").read_text())["fingerprints"]
    assert fingerprints["cache"] == made["cache"]
    assert fingerprints["student"] == made["student"]


def test_a_flipped_byte_in_a_shard_stops_the_student_with_the_way_out(copied_run: Path) -> None:
    shutil.rmtree(copied_run / "students")
    shard = copied_run / "cache" / "train-00000.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    outcome = on(copied_run, "distill")
    assert outcome.code == 1
    assert "train-00000.h5: dataset" in outcome.stderr
    assert "delete this shard and run `tristill dump-logits` again" in outcome.stderr
    shard.unlink()
    assert on(copied_run, "run").code == 0


def test_a_changed_corpus_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for n in range(30):
        (tmp_path / "text" / f"{n}.txt").write_text(f"the story of number {n} " * 40)
    source = (
        "--set",
        f"data.source={{kind='text', paths=['{tmp_path / 'text'}']}}",
        "--set",
        "data.max_train_tokens=3000",
    )
    assert on(tmp_path / "run", "tokenize", *source).code == 0
    assert "up to date" in on(tmp_path / "run", "tokenize", *source).stderr
    (tmp_path / "text" / "3.txt").touch()
    assert "up to date" in on(tmp_path / "run", "tokenize", *source).stderr
    (tmp_path / "text" / "30.txt").write_text("one more")
    outcome = on(tmp_path / "run", "tokenize", *source)
    assert outcome.code == 1
    assert "input corpus: was" in outcome.stderr
    shutil.rmtree(tmp_path / "text")
    assert "up to date" in on(tmp_path / "run", "tokenize", *source).stderr


@pytest.mark.parametrize(("command", "missing"), [("teacher", "tokenize"), ("dump-logits", "tokenize")])
def test_a_step_alone_never_runs_another_but_names_it(
    step: Callable[..., Outcome], tmp_path: Path, command: str, missing: str
) -> None:
    outcome = step(command)
    assert outcome.code == 1
    assert f"which is missing or unfinished; run `tristill {missing}` first" in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_distill_without_cache_says_which_command_makes_it(step: Callable[..., Outcome]) -> None:
    outcome = step("distill", "--targets", "cached")
    assert outcome.code == 1
    assert "found no cache; run `tristill dump-logits`" in outcome.stderr
    outcome = step("distill", "--targets", "online")
    assert "which is missing or unfinished; run `tristill tokenize` first" in outcome.stderr


def test_files_that_are_not_ours_are_never_touched(step: Callable[..., Outcome], tmp_path: Path) -> None:
    precious = tmp_path / "run" / "data" / "train.npy"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"years of work")
    for force in ((), ("--force",)):
        outcome = step("tokenize", *force)
        assert outcome.code == 1
        assert "holds train.npy but no provenance.json, so it was not made by `tristill tokenize`" in outcome.stderr
    assert precious.read_bytes() == b"years of work"


def test_two_processes_do_not_work_in_one_folder(copied_run: Path) -> None:
    descriptor = os.open(copied_run / "teacher", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        outcome = on(copied_run, "teacher")
        assert outcome.code == 1
        assert "teacher: another process is working on it" in outcome.stderr
    finally:
        os.close(descriptor)


def test_a_missing_or_damaged_shard_is_dumped_again_byte_for_byte(copied_run: Path) -> None:
    cache = copied_run / "cache"
    before = {path.name: path.read_bytes() for path in cache.iterdir() if path.name != "provenance.json"}
    (cache / "train-00001.h5").write_bytes(before["train-00001.h5"][:-1])
    (cache / "validation-00000.h5").unlink()
    outcome = tristill("cache", "verify", str(cache))
    assert outcome.code == 1
    assert outcome.stdout.count("delete this shard and run `tristill dump-logits` again") == 2
    assert on(copied_run, "dump-logits").code == 0
    assert before == {path.name: path.read_bytes() for path in cache.iterdir() if path.name != "provenance.json"}
    assert tristill("cache", "verify", str(cache)).stdout == f"{cache}: every byte is as it was written\n"


def test_one_cache_serves_another_run_without_teacher_or_corpus(finished_run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(finished_run / "cache", tmp_path / "shared")
    outcome = on(elsewhere, "distill", "--targets", "cached", "--set", f"cache.dir={tmp_path / 'shared'}")
    assert outcome.code == 0, outcome.stderr
    assert sorted(path.name for path in elsewhere.iterdir()) == ["config.toml", "students"]
    weights = [folder / "students" / "student" / "model.safetensors" for folder in (finished_run, elsewhere)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    outcome = on(elsewhere, "run", "--dry-run", "--set", f"cache.dir={tmp_path / 'shared'}")
    assert outcome.stdout == "distill --name no-teacher\n"


def test_a_cache_of_another_teacher_is_refused(copied_run: Path, finished_run: Path) -> None:
    shutil.rmtree(copied_run / "students")
    changed = ("--set", "teacher.training.seed=5")
    assert on(copied_run, "teacher", *changed, "--force").code == 0
    outcome = on(copied_run, "distill", *changed)
    assert outcome.code == 1
    assert "the cache was made by another teacher: found fingerprint" in outcome.stderr


def test_provenance_says_what_was_made_from_what(finished_run: Path) -> None:
    records = {
        name: json.loads((finished_run / folder / "provenance.json").read_text())
        for name, folder in (
            ("data", "data"),
            ("teacher", "teacher"),
            ("cache", "cache"),
            ("student", "students/student"),
        )
    }
    for record in records.values():
        assert record["status"] == "complete"
        assert record["elapsed_s"] > 0
        assert record["peak_rss_mib"] > 10
        assert record["versions"]["torch"]
        assert record["command"].startswith("tristill ")
    assert records["teacher"]["inputs"] == {"data": records["data"]["fingerprint"]}
    assert records["cache"]["inputs"] == {name: records[name]["fingerprint"] for name in ("data", "teacher")}
    assert records["student"]["inputs"] == {name: records[name]["fingerprint"] for name in ("data", "teacher", "cache")}
    assert records["student"]["settings"]["student"]["model"]["width"] == 32


def test_a_new_name_is_a_new_student_of_the_same_cache(copied_run: Path) -> None:
    outcome = on(copied_run, "distill", "--name", "colder", "--set", "distill.alpha=0.1")
    assert outcome.code == 0
    assert (copied_run / "students" / "colder" / "summary.json").is_file()
    assert list(json.loads(on(copied_run, "evaluate", "--json").stdout)) == [
        "teacher",
        "student",
        "no-teacher",
        "colder",
    ]
    config = str(copied_run / "config.toml")
    assert tristill("run", "--dry-run", "--config", config).stdout == "nothing to do\n"
    assert "student name '../x'" in on(copied_run, "distill", "--name", "../x").stderr


def test_evaluate_agrees_with_the_summary_and_knows_the_teacher(copied_run: Path) -> None:
    outcome = on(copied_run, "evaluate", "--json")
    metrics = json.loads(outcome.stdout)
    assert list(metrics) == ["teacher", "student", "no-teacher"]
    summary = json.loads((copied_run / "students" / "student" / "summary.json").read_text())
    assert metrics["student"] == {**summary["validation"], "basis": summary["basis"]}
    assert "student: unchanged since its metrics in summary.json were computed" in outcome.stderr
    assert "evaluate student" not in outcome.stderr
    assert "evaluate teacher" in outcome.stderr, "its summary knows no targets of the cache"
    again = on(copied_run, "evaluate", "--json")
    assert "evaluate teacher" not in again.stderr, "now evaluation.json knows"
    assert json.loads(again.stdout) == metrics
    for arguments in (("--set", "evaluate.calibration_bins=7"), ("--force",)):
        computed = on(copied_run, "evaluate", "student", "--json", *arguments)
        assert "evaluate student" in computed.stderr
        found = json.loads(computed.stdout)["student"]
        assert found["perplexity"] == metrics["student"]["perplexity"]
    assert found == metrics["student"]
    assert found["standard_errors"]["unit"] == "window", "there are too few documents"
    assert json.loads(on(copied_run, "evaluate", "--json").stdout) == metrics
    assert metrics["teacher"]["kl_to_teacher_nats"] == pytest.approx(0, abs=2e-3)
    assert metrics["teacher"]["top1_agreement"] == 1
    assert json.loads((copied_run / "evaluation.json").read_text()) == metrics
    shutil.rmtree(copied_run / "cache")
    online = json.loads(on(copied_run, "evaluate", "student", "--json").stdout)["student"]
    assert online["perplexity"] == pytest.approx(metrics["student"]["perplexity"], rel=1e-5)
    assert online["kl_to_teacher_nats"] == pytest.approx(metrics["student"]["kl_to_teacher_nats"], abs=2e-3)
    folder = str(copied_run / "students" / "student")
    assert json.loads(on(copied_run, "evaluate", folder, "--json").stdout)[folder] == online
    assert "nobody: found no model in" in on(copied_run, "evaluate", "nobody").stderr


def test_cache_info_reports_bytes_that_add_up(finished_run: Path) -> None:
    cache = finished_run / "cache"
    info = json.loads(tristill("cache", "info", str(cache), "--json").stdout)
    assert info["file_bytes"] == sum(path.stat().st_size for path in cache.glob("*.h5"))
    per_dataset = [value for name, value in info["bytes_per_position"].items() if name != "on disk"]
    assert 0 < sum(per_dataset) < info["bytes_per_position"]["on disk"]
    text = tristill("cache", "info", *CONFIG, "--run-dir", str(finished_run)).stdout
    assert "kind transform, step 0.1" in text
    assert "hidden_2" in text


def test_usage_errors_exit_with_two_and_one_message() -> None:
    outcome = tristill("distill", "--set", "distill.alhpa=1")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "distill.alhpa: unknown key; did you mean 'alpha'?" in outcome.stderr
    assert tristill("distil").code == 2
    assert tristill("run", "--until", "never").code == 2
    assert tristill("cache", "info", "nowhere").code == 1


def test_help_is_there_for_every_command() -> None:
    outcome = tristill("--help")
    assert outcome.code == 0
    assert "tristill run --until distill" in outcome.stdout
    assert (ROOT / "docs" / "cli.md").read_text().count("Usage: tristill") == 23
