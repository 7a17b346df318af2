"""Heavy steps on many ranks through the command line: the same bytes, one message, and nothing lost with a rank."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import pytest
from torchrun import command, outcome, ranks_of, start

from conftest import tristill
from tristill.pipeline.config import load_config
from tristill.pipeline.errors import BusyError
from tristill.pipeline.provenance import held_with_others, locked, new_provenance, write_provenance
from tristill.pipeline.steps import DumpLogits
from tristill.pipeline.workspace import Workspace
from tristill.stages.dump.dump import dump_logits

MANY_SHARDS = (
    "data.max_train_tokens=60_000",
    "teacher.training.steps=6",
    "cache.max_train_windows=1500",
    "cache.batch_windows=2",
)
ON_TWO_RANKS = [sys.executable, "-m", "tristill.stages.launcher", "2", "pipeline"]


def of_run(run_dir: Path, *changes: str) -> list[str]:
    return ["--config", "configs/test.toml", "--run-dir", str(run_dir), *(p for c in changes for p in ("--set", c))]


def files(folder: Path) -> dict[str, bytes]:
    """All that must be equal: everything but the record of times and memory."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "provenance.json"}


@pytest.fixture
def before_dump(finished_run: Path, tmp_path: Path) -> Path:
    """A run that has its teacher and no cache."""
    for name in ("data", "teacher"):
        shutil.copytree(finished_run / name, tmp_path / "run" / name)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose cache has seven shards; the cache of one process lies beside it."""
    run_dir = tmp_path_factory.mktemp("many") / "run"
    for step in ("tokenize", "teacher"):
        done = tristill(step, *of_run(run_dir, *MANY_SHARDS))
        assert done.code == 0, done.stderr
    config = load_config(Path("configs/test.toml"), MANY_SHARDS).cache
    dump_logits(config, run_dir / "data", run_dir / "teacher", run_dir.parent / "cache")
    assert len(list((run_dir.parent / "cache").glob("*-*.h5"))) == 7
    return run_dir


@pytest.mark.slow  # the same bytes by a script: tests/test_stages/test_dump_on_ranks.py
def test_a_cache_has_the_same_bytes_for_three_ranks_as_for_one(finished_run: Path, before_dump: Path) -> None:
    done = outcome(command(3, "dump-logits", *of_run(before_dump)))
    assert done.code == 0, done.stderr
    assert done.stdout == f"{before_dump / 'cache'}\n"
    assert done.stderr.count("16,768 of 16,768 (100%) positions") == 1
    assert files(before_dump / "cache") == files(finished_run / "cache")
    assert tristill("dump-logits", *of_run(before_dump)).stderr.startswith("dump-logits: up to date")


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 13))])
def test_a_lost_rank_loses_its_unfinished_shard_alone(many_shards: Path, tmp_path: Path, seed: int) -> None:
    """Killed at a random moment, perhaps again, and finished by another number of ranks."""
    generator = random.Random(seed)
    run_dir = Path(shutil.copytree(many_shards, tmp_path / "run"))
    folder = run_dir / "cache"
    arguments = ("dump-logits", *of_run(run_dir, *MANY_SHARDS))
    for _ in range(1 if seed == 1 else generator.randint(1, 3)):
        kept = {path: path.stat().st_ino for path in folder.glob("*-*.h5")}
        process = start(command(3, *arguments))
        wait_for(lambda kept=kept: bool(set(folder.glob("*-*.h5")) - set(kept)), process)
        time.sleep(generator.uniform(0, 0.4))
        victim = generator.randrange(3)
        if pid := ranks_of(process).get(victim):
            os.kill(pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=100)
        if process.returncode == 0:
            break  # it was faster
        assert not (folder / "cache.json").exists()
        assert f"rank      : {victim} " in stderr.split("Root Cause")[1]
        assert all(path.stat().st_ino == inode for path, inode in kept.items()), "what was there is not dumped again"
    in_the_end = 2 if seed == 1 else generator.randint(1, 3)
    run = ("run", "--until", "dump-logits", "--ranks", str(in_the_end), *arguments[1:])
    done = tristill(*run) if seed % 2 else outcome(command(in_the_end, *arguments))
    assert done.code == 0, done.stderr
    assert done.stdout.count(f"{folder}\n") + done.stderr.count(f"{folder}\n") == 1
    assert "OMP_NUM_THREADS" not in done.stderr
    assert files(folder) == files(many_shards.parent / "cache")


def wait_for(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not is_so() and process.poll() is None:
        time.sleep(0.01)


def test_ctrl_c_ends_all_ranks_with_one_message(many_shards: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(many_shards, tmp_path / "run"))
    arguments = ("run", "--until", "dump-logits", "--ranks", "2", *of_run(run_dir, *MANY_SHARDS))
    process = start([sys.executable, "-m", "tristill.pipeline", *arguments])
    wait_for(lambda: bool(list((run_dir / "cache").glob("*.h5"))), process)
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, stderr
    assert stderr.endswith("interrupted; run the same command again to go on\n")
    assert "Traceback" not in stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert not (run_dir / "cache" / "cache.json").exists()


def test_what_is_wrong_is_told_once_for_all_ranks(finished_run: Path, before_dump: Path) -> None:
    """Before they join (a bad config), by the one that decides (a stale cache), and in torchrun's own report."""
    refused = outcome([*ON_TWO_RANKS, "dump-logits", *of_run(before_dump, "cache.profil=1")])
    assert refused.code == 2
    assert refused.stderr == (
        "error: configs/test.toml: 1 problems:\n  cache.profil: unknown key; did you mean 'profile'?\n"
    )
    assert not refused.stdout
    shutil.copytree(finished_run / "cache", before_dump / "cache")
    stale = outcome(command(2, "dump-logits", *of_run(before_dump, "cache.calibration_windows=5")))
    assert stale.code == 1
    said, report = stale.stderr.split("torch/distributed", 1)
    assert said.count("error:") == 1
    assert "cache.calibration_windows: was 64, is 5" in said
    assert "cache.calibration_windows: was 64, is 5" in report.split("Root Cause")[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("dump-logits",), 1, "which is missing or unfinished; run `tristill tokenize` first"),
        (("distill", "--targets", "online"), 1, "which is missing or unfinished; run `tristill tokenize` first"),
        (("teacher", "--frce"), 2, "No such option '--frce'"),
        (("evaluate",), 2, "evaluate works in one process, and WORLD_SIZE announces 2; start it without torchrun"),
        (("tokenize",), 2, "tokenize works in one process, and WORLD_SIZE announces 2; start it without torchrun"),
        (("run",), 2, "run works in one process, and WORLD_SIZE announces 2; start it without torchrun"),
    ],
)
def test_refusals_on_ranks_are_those_of_one_process(
    tmp_path: Path, arguments: tuple[str, ...], code: int, text: str
) -> None:
    refused = outcome([*ON_TWO_RANKS, *arguments, *of_run(tmp_path)])
    assert refused.code == code
    assert refused.stderr.count("error:") == refused.stderr.count(text) == 1


@pytest.mark.slow
def test_an_error_on_one_rank_alone_ends_all_and_is_told(many_shards: Path, tmp_path: Path) -> None:
    """Rank 1 finds something in its way where its shard is to lie; the others find nothing wrong."""
    run_dir = Path(shutil.copytree(many_shards, tmp_path / "run"))
    step = DumpLogits(Workspace(load_config(Path("configs/test.toml"), MANY_SHARDS), run_dir))
    (step.folder / "train-00001.h5").mkdir(parents=True)
    write_provenance(step.folder, new_provenance(step.label, step.settings(), step.inputs()))
    failed = outcome([*ON_TWO_RANKS, "dump-logits", *of_run(run_dir, *MANY_SHARDS)])
    assert failed.code == 1
    assert failed.stderr.count("error:") == 1
    assert "train-00001.h5: could not be written (Is a directory)" in failed.stderr
    assert "interrupted" not in failed.stderr


def test_a_whole_run_on_two_ranks_ends_as_one_does(finished_run: Path, tmp_path: Path) -> None:
    arguments = of_run(tmp_path)
    done = tristill("run", "--ranks", "2", *arguments)
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("| model ")
    for model in ("teacher", "students/student"):
        found, expected = (
            json.loads((run / model / "summary.json").read_text())["validation"]["loss_nats"]
            for run in (tmp_path, finished_run)
        )
        assert found == pytest.approx(expected, rel=2e-3)
    again = tristill("run", "--dry-run", *arguments)
    assert again.stdout == "nothing to do\n"


def test_no_ranks_are_refused(tmp_path: Path) -> None:
    refused = tristill("run", "--ranks", "0", *of_run(tmp_path))
    assert refused.code == 2
    assert "0 is not in the range 1<=x<=4096" in refused.stderr


def test_a_folder_is_held_until_its_last_rank_has_ended(tmp_path: Path) -> None:
    busy = "another process is working on it"
    with ExitStack() as second_rank:
        with locked(tmp_path) as hold:
            with pytest.raises(BusyError, match=busy), held_with_others(tmp_path):
                pytest.fail("the first one has not shared it")
            hold.share()
            second_rank.enter_context(held_with_others(tmp_path))
            with pytest.raises(BusyError, match=busy), locked(tmp_path):
                pytest.fail("two work on it")
        with pytest.raises(BusyError, match=busy), locked(tmp_path):
            pytest.fail("the first rank is gone, and another still writes")
    with locked(tmp_path):
        pass


def states_of(pids: Iterable[int]) -> set[str]:
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}


@pytest.mark.slow
def test_ctrl_z_stops_the_ranks_of_run_and_a_closed_terminal_has_them_save(before_dump: Path) -> None:
    shutil.rmtree(before_dump / "teacher")
    options = of_run(before_dump, "teacher.training.steps=100000", "teacher.training.checkpoint_every=3")
    process = start([sys.executable, "-m", "tristill.pipeline", "run", "--ranks", "2", *options])
    metrics = before_dump / "teacher" / "metrics.jsonl"
    while not metrics.exists() and process.poll() is None:
        time.sleep(0.1)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    process.send_signal(signal.SIGTSTP)
    time.sleep(1)
    assert states_of([process.pid, *ranks.values()]) == {"T"}
    process.send_signal(signal.SIGCONT)
    time.sleep(1)
    assert "T" not in states_of([process.pid, *ranks.values()])
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert list((before_dump / "teacher" / "checkpoints").glob("step-*"))
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        (["unshare", "--uts", "sh", "-c", 'hostname no-such-host-1; exec "$@"', "sh"], 0, ""),
        (
            ["unshare", "--net"],
            1,
            "error: 127.0.0.1: ranks of one machine cannot meet there (Network is unreachable); ",
        ),
    ],
    ids=["a host name that does not resolve", "no network interface"],
)
def test_ranks_of_one_machine_need_its_loopback_interface_alone(
    before_dump: Path, setting: list[str], code: int, message: str
) -> None:
    if subprocess.run([*setting, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this process may not make name spaces")
    done = outcome([*setting, *ON_TWO_RANKS, "dump-logits", *of_run(before_dump)])
    assert done.code == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
