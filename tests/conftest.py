"""Small real things that many tests use: caches written by the writer, and runs made by the command line."""

import atexit
import functools
import hashlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from forked_commands import Commands

from tristill.cache import Cache, CacheSpec, CacheWriter, HiddenSpec, PlainTopKProfile, SplitSpec, open_cache

if TYPE_CHECKING:
    from survival import Runs

pytest_plugins = ["s3_server"]

ROOT = Path(__file__).resolve().parent.parent
# Small runs beside other work: threads of torch that wait for one another would take most of the time.
# TRISTILL_DEBUG: a fault that no code of ours foresaw has its traceback, which no test lets pass.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRISTILL_DEBUG": "1"}
TOKENIZER_JSON = b'{"any": "bytes will do"}'


def pytest_configure() -> None:
    """A shell that starts tests in its background has them ignore Ctrl-C, and so would every process they start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # of `nohup`
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def make_spec(
    train: int = 70, validation: int = 5, *, per_chunk: int = 4, per_shard: int = 16, **changes: object
) -> CacheSpec:
    settings: dict[str, object] = {
        "vocab_size": 300,
        "end_of_text_id": 0,
        "context_length": 6,
        "profile": PlainTopKProfile(top_k=5, temperature=2.0),
        "hidden": HiddenSpec(layers=(1, 3), width=8),
        "splits": {
            "train": SplitSpec(num_windows=train, bytes_per_token=3.0, fingerprint="a" * 64),
            "validation": SplitSpec(num_windows=validation, bytes_per_token=3.5, fingerprint="b" * 64),
        },
        "windows_per_chunk": per_chunk,
        "windows_per_shard": per_shard,
        "teacher_fingerprint": "c" * 64,
        "tokenizer_fingerprint": hashlib.sha256(TOKENIZER_JSON).hexdigest(),
    }
    return CacheSpec.model_validate(settings | changes)


def window_arrays(spec: CacheSpec, split: str, windows: range) -> dict[str, np.ndarray]:
    """Content of windows as a pure function of their place, so that any reader can be checked against it."""
    arrays = {}
    for array in spec.arrays:
        rows = []
        for window in windows:
            key = int.from_bytes(hashlib.sha256(f"{split}/{array.name}/{window}".encode()).digest()[:8], "big")
            generator = np.random.default_rng(key)
            if np.dtype(array.dtype).kind == "u":
                rows.append(generator.integers(0, spec.vocab_size, array.shape))
            else:
                rows.append(generator.normal(size=array.shape))
        arrays[array.name] = np.stack(rows).astype(array.dtype)
    return arrays


def write_shards(writer: CacheWriter, *, batch: int = 3, at_most: int | None = None) -> None:
    for shard in writer.missing_shards()[:at_most]:
        shard_writer = writer.shard(shard)
        end = shard.first_window + shard.num_windows
        for first in range(shard.first_window, end, batch):
            shard_writer.append(window_arrays(writer.spec, shard.split, range(first, min(first + batch, end))))
        shard_writer.commit()


def write_cache(folder: Path, spec: CacheSpec, *, batch: int = 3) -> Cache:
    writer = CacheWriter(folder, spec, TOKENIZER_JSON)
    write_shards(writer, batch=batch)
    writer.finish()
    return open_cache(folder)


@pytest.fixture
def small_cache(tmp_path: Path) -> Iterator[Cache]:
    cache = write_cache(tmp_path / "cache", make_spec())
    yield cache
    cache.close()


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


@functools.cache
def _commands() -> Commands:
    folder = tempfile.TemporaryDirectory(prefix="tristill-tests-")
    commands = Commands(Path(folder.name), environment=ENVIRONMENT, cwd=ROOT)
    atexit.register(folder.cleanup)
    atexit.register(commands.__exit__, None, None, None)
    return commands


def tristill(*arguments: str, cwd: Path = ROOT, timeout_s: float = 300) -> Outcome:
    """Run the command line in a process of its own, forked from one that has loaded everything; -9 when out of time."""
    ended = _commands().end(*arguments, cwd=cwd, kill_after_s=timeout_s)
    return Outcome(ended.code, ended.stdout, ended.stderr)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that `configs/test.toml` makes, by one command. Tests must not change it: see `copied_run`."""
    run_dir = tmp_path_factory.mktemp("runs") / "test"
    outcome = tristill("run", "--until", "distill", "--config", "configs/test.toml", "--run-dir", str(run_dir))
    assert outcome.code == 0, outcome.stderr
    (run_dir / "stdout.txt").write_text(outcome.stdout)
    return run_dir


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Runs]":
    """A run of every stage for the tests of kills and failing systems, and forked processes for more of them."""
    from survival import started_runs

    yield from started_runs(tmp_path_factory.mktemp("survival"))


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of `finished_run` to break."""
    target = tmp_path / "run"
    subprocess.run(["cp", "-r", "--preserve=timestamps", str(finished_run), str(target)], check=True)
    return target


@pytest.fixture
def step(tmp_path: Path) -> Callable[..., Outcome]:
    """Run one command of the test config in a folder of this test."""

    def run(*arguments: str, run_dir: Path = tmp_path / "run") -> Outcome:
        return tristill(*arguments, "--config", "configs/test.toml", "--run-dir", str(run_dir))

    return run
