"""Ctrl-C and limits on files: the same command goes on. For kills and real full disks see test_survival/."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ENVIRONMENT, ROOT

SLOW_DOWN = ("--set", "teacher.training.checkpoint_every=3", "--set", "distill.training.checkpoint_every=3")


def start(run_dir: Path, *arguments: str, limit_bytes: int | None = None) -> subprocess.Popen[str]:
    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.Popen(
        [sys.executable, "-m", "tristill.pipeline", *arguments, "--config", "configs/test.toml", "--run-dir", str(run_dir), *SLOW_DOWN],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=limit,  # noqa: PLW1509 - no threads here
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("send", "signum"),
    [(os.kill, signal.SIGINT), (os.killpg, signal.SIGINT), (os.killpg, signal.SIGHUP)],
    ids=["to run alone", "to all, as a terminal does", "to all, as a terminal that is closed does"],
)
def test_an_interrupt_of_run_lets_its_step_save_and_end(
    finished_run: Path, tmp_path: Path, send: Callable[[int, int], None], signum: signal.Signals
) -> None:
    shutil.copytree(finished_run / "data", tmp_path / "data")
    process = start(tmp_path, "run", "--set", "teacher.training.steps=100000")
    while not (tmp_path / "teacher" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    send(process.pid, signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert list((tmp_path / "teacher" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("delay_s", [0.05, 0.15, 0.25, 0.4])
def test_ctrl_c_while_python_loads_is_quiet(finished_run: Path, tmp_path: Path, delay_s: float) -> None:
    process = start(tmp_path, "tokenize")
    time.sleep(delay_s)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "in main" not in stderr, "a traceback that went through our code"


def test_ctrl_c_says_how_to_go_on_and_keeps_a_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "data", tmp_path / "data")
    process = start(tmp_path, "teacher", "--set", "teacher.training.steps=100000")
    while not (tmp_path / "teacher" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.endswith("interrupted; run the same command again to go on\n")
    assert "Traceback" not in stderr
    assert list((tmp_path / "teacher" / "checkpoints").glob("step-*"))
    assert not (tmp_path / "teacher" / "model.safetensors").exists()


@pytest.mark.parametrize("command", ["run", "dump-logits"])
def test_ctrl_c_reaches_the_step_at_work_and_ends_quietly(finished_run: Path, tmp_path: Path, command: str) -> None:
    for folder in ("data", "teacher"):
        shutil.copytree(finished_run / folder, tmp_path / folder)
    process = start(tmp_path, command, "--set", "cache.batch_windows=1", "--set", "cache.compression_level=22")
    while not (tmp_path / "cache" / "tokenizer.json").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted; run the same command again to go on" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "cache" / "cache.json").exists()


@pytest.mark.parametrize("delay_s", [0.0, 0.1])
def test_a_second_signal_ends_a_dump_as_quietly_as_one(finished_run: Path, tmp_path: Path, delay_s: float) -> None:
    """What `run` sends after the Ctrl-C of a terminal: it may come while workers are waited for, or Python ends."""
    for folder in ("data", "teacher"):
        shutil.copytree(finished_run / folder, tmp_path / folder)
    process = start(tmp_path, "dump-logits", "--set", "cache.batch_windows=100", "--set", "cache.compression_level=22")
    while not (tmp_path / "cache" / "tokenizer.json").exists() and process.poll() is None:
        time.sleep(0.01)
    for signum in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(signum)
        time.sleep(delay_s)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.endswith("\ninterrupted; run the same command again to go on\n")
    assert "Traceback" not in stderr
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_a_full_disk_while_dumping_keeps_finished_shards_and_goes_on(finished_run: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: shards of the validation split fit, those of train do not."""
    for folder in ("data", "teacher"):
        shutil.copytree(finished_run / folder, tmp_path / folder)
    shard_bytes = (finished_run / "cache" / "train-00000.h5").stat().st_size
    process = start(tmp_path, "dump-logits", limit_bytes=shard_bytes - 1000)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "could not be written (File too large)" in stderr
    assert "finished shards are safe: free some space" in stderr
    assert "Traceback" not in stderr
    assert not list((tmp_path / "cache").glob(".*.partial"))
    process = start(tmp_path, "dump-logits")
    process.communicate(timeout=60)
    assert process.returncode == 0
    names = [path.name for path in (finished_run / "cache").iterdir() if path.name != "provenance.json"]
    assert all(
        (tmp_path / "cache" / name).read_bytes() == (finished_run / "cache" / name).read_bytes() for name in names
    )
