"""A run on text that another run's teacher wrote: made whole, gone on with, stale when the teacher changes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ENVIRONMENT, ROOT, Outcome, tristill

SMALL = ("--set", "data.context_length=16", "--set", "teacher.training.steps=10")


def arguments(run_dir: Path, model: Path, *further: str) -> list[str]:
    source = f'kind="synthetic", model="{model}", documents=300, max_tokens=32, batch_documents=10'
    assignment = f"data.source={{{source}}}"
    return ["--config", "configs/test.toml", "--run-dir", str(run_dir), "--set", assignment, *SMALL, *further]


def step(command: str, run_dir: Path, model: Path, *further: str) -> Outcome:
    return tristill(command, *arguments(run_dir, model, *further))


def start(run_dir: Path, model: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tristill.pipeline", "tokenize", *arguments(run_dir, model)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def files(folder: Path) -> dict[str, bytes]:
    """All that must be equal: everything but the record, which has times."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "provenance.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_teacher_trains_on_what_another_wrote(finished_run: Path, tmp_path: Path) -> None:
    outcome = step("run", tmp_path / "run", finished_run / "teacher", "--until", "teacher")
    assert outcome.code == 0, outcome.stderr
    assert "synthetic: 300 of 300 (100%) documents" in outcome.stderr
    assert "tokens/s" in outcome.stderr
    assert (tmp_path / "run" / "teacher" / "summary.json").is_file()
    assert len(list((tmp_path / "run" / "data" / "synthetic").glob("part-*.jsonl"))) == 30
    again = step("tokenize", tmp_path / "run", finished_run / "teacher")
    assert "tokenize: up to date" in again.stderr


def test_a_student_is_an_author_like_any_other(finished_run: Path, tmp_path: Path) -> None:
    outcome = step("tokenize", tmp_path / "run", finished_run / "students" / "student")
    assert outcome.code == 0, outcome.stderr


def test_a_corpus_that_was_interrupted_and_killed_ends_as_one_that_was_not(finished_run: Path, tmp_path: Path) -> None:
    model = finished_run / "teacher"
    written = tmp_path / "broken" / "data" / "synthetic"
    for send, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        before = set(written.glob("part-*"))
        process = start(tmp_path / "broken", model)
        while len(set(written.glob("part-*")) - before) < 3 and process.poll() is None:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, send)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        assert "Traceback" not in stderr
    parts = {path: path.stat().st_mtime_ns for path in written.glob("part-*")}
    assert 6 <= len(parts) < 30
    for run in ("broken", "whole"):
        outcome = step("tokenize", tmp_path / run, model)
        assert outcome.code == 0, outcome.stderr
    assert {path: path.stat().st_mtime_ns for path in parts} == parts, "finished parts are not written again"
    found = files(tmp_path / "broken" / "data")
    found = {name: content for name, content in found.items() if not name.endswith(".partial")}
    assert found == files(tmp_path / "whole" / "data")


def test_another_model_makes_the_corpus_stale_until_it_is_forced(finished_run: Path, tmp_path: Path) -> None:
    model = shutil.copytree(finished_run / "teacher", tmp_path / "model")
    assert step("tokenize", tmp_path / "run", model).code == 0
    first = files(tmp_path / "run" / "data")
    shutil.copy(finished_run / "students" / "no-teacher" / "model.safetensors", model)
    refused = step("tokenize", tmp_path / "run", model)
    assert refused.code == 1
    assert "made with other settings or inputs" in refused.stderr
    assert "input corpus: was" in refused.stderr
    assert step("tokenize", tmp_path / "run", model, "--force").code == 0
    second = files(tmp_path / "run" / "data")
    assert second.keys() == first.keys()
    assert second["synthetic/part-00000.jsonl"] != first["synthetic/part-00000.jsonl"]


def test_settings_are_refused_with_their_reason(finished_run: Path, tmp_path: Path) -> None:
    model = finished_run / "teacher"
    long = step("tokenize", tmp_path / "run", model, "--set", "data.source.max_tokens=33")
    assert long.code == 1
    assert "found 33 tokens, expected at most 32 in all, the context length of" in long.stderr
    assert step("tokenize", tmp_path / "run", model, "--set", "data.source.documents=60").code == 0, (
        "nothing was written"
    )
    missing = step("tokenize", tmp_path / "other", tmp_path / "nowhere")
    assert missing.code == 1
    assert f"{tmp_path / 'nowhere' / 'config.json'}: found no file there" in missing.stderr
    bounds = step("tokenize", tmp_path / "other", model, "--set", "data.source.top_p=0")
    assert bounds.code == 2
    assert "top_p" in bounds.stderr


def test_a_run_does_not_feed_on_itself(copied_run: Path) -> None:
    before = files(copied_run)
    refused = step("tokenize", copied_run, copied_run / "teacher", "--force")
    assert refused.code == 2
    assert "which this run folder makes from the corpus itself; expected a model of another run" in refused.stderr
    assert files(copied_run) == before


def test_hub_data_sets_have_no_signature_and_pass_the_command_line(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text("".join(f'{{"text": "line {n} of a very small data set"}}\n' for n in range(200)))
    source = f'data.source={{kind="hf", path="json", arguments={{data_files="{rows}"}}}}'
    outcome = tristill("tokenize", "--config", "configs/test.toml", "--run-dir", str(tmp_path / "run"), "--set", source)
    assert outcome.code == 0, outcome.stderr
