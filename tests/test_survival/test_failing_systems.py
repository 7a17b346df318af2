"""Full disks, file systems that can only be read, permissions, files that vanish, clocks that go back.

Each with the real thing: a small tmpfs, a bind mount that is read-only, a process without root's right to pass by
permissions, files that are changed while a command reads them, and a clock of the system that runs backwards. Every
failure is one message, without a traceback, that names the place; the same command then ends as if nothing had been.
"""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_commands import Commands, Ended
from survival import STAGES, Runs, Stage, content

from conftest import ENVIRONMENT, ROOT

SEED = 11
PAGE_BYTES = 4096
WITHOUT_CHECKPOINTS = {name: ("--set", f"{name}.training.checkpoint_every=1000") for name in ("teacher", "distill")}
"""So that the final files are the largest that are written."""
AS_OTHERS = """
import ctypes
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, none) == 0, "a process may always give up its rights"
"""
"""Gives up what root may do beyond its user, reading and writing against permissions among it."""


def mounted(*arguments: object) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], check=False, capture_output=True).returncode == 0


@contextlib.contextmanager
def mount(folder: Path, *arguments: object) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    if not mounted(*arguments, folder):
        pytest.skip("this process may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def one_message(ended: Ended) -> str:
    """What a command that failed has said."""
    assert ended.code == 1, ended.stderr
    (message,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    return message


def must_finish(runs: Runs, run_dir: Path, stage: Stage, *options: str) -> None:
    ended = runs.run(run_dir, *stage.arguments, *options)
    assert ended.code == 0, ended.stderr
    assert runs.final(run_dir, stage) == runs.final(runs.whole, stage)
    assert not [path.name for path in run_dir.rglob(".*")]


def room_wanted(runs: Runs, stage: Stage) -> int:
    """Bytes that the whole artefact takes on a file system of pages."""
    files = [runs.whole / stage.artefact / name for name in runs.final(runs.whole, stage)]
    sizes = [path.stat().st_size for path in files if path.is_file()]
    return sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes)


@pytest.mark.parametrize("num_sizes", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk_says_which_file_and_with_more_room_the_command_goes_on(
    runs: Runs, tmp_path: Path, name: str, num_sizes: int
) -> None:
    stage, generator = STAGES[name], random.Random(f"{SEED} {name}")
    struck = []
    for number in range(num_sizes):
        most = room_wanted(runs, stage) - 2 * PAGE_BYTES
        room = generator.randrange(PAGE_BYTES, most if number % 2 else min(most, 12 * PAGE_BYTES), PAGE_BYTES)
        disk = tmp_path / f"disk-{number}"
        with mount(disk, "-t", "tmpfs", "-o", "size=64m", "tmpfs"):
            run_dir = runs.before(stage, disk / "run")
            used = subprocess.run(["du", "-sB1", disk], check=True, capture_output=True, text=True).stdout.split()[0]
            assert mounted("-o", f"remount,size={int(used) + room}", disk)
            options = WITHOUT_CHECKPOINTS.get(name, ()) if number % 2 else ()
            ended = runs.run(run_dir, *stage.arguments, *options)
            message = one_message(ended)
            assert re.search("No space left on device|database or disk is full|as on a full disk", message), message
            struck.append(message.split(":")[1].strip().removeprefix(str(run_dir)))
            assert struck[-1].startswith("/"), message
            assert not [path.name for path in run_dir.rglob(".*.partial")], "the room is wanted"
            assert mounted("-o", "remount,size=64m", disk)
            must_finish(runs, run_dir, stage, *options)
    print(json.dumps({"full disk": name, "struck": struck}))


@pytest.mark.parametrize(
    "name", [name if name[0] in "td" else pytest.param(name, marks=pytest.mark.slow) for name in STAGES]
)
def test_a_file_system_that_can_only_be_read_is_told_and_left_as_it_is(runs: Runs, tmp_path: Path, name: str) -> None:
    stage = STAGES[name]
    run_dir = runs.before(stage, tmp_path / "run")
    if stage.name == "distill":  # half done
        assert runs.run(run_dir, *stage.arguments, kill_before_change=25).was_killed
    before = content(run_dir)
    with mount(run_dir, "--bind", run_dir):
        assert mounted("-o", "remount,bind,ro", run_dir)
        message = one_message(runs.run(run_dir, *stage.arguments))
        assert "Read-only file system" in message or "unable to open database file" in message
        assert str(run_dir) in message
        for made in stage.needs:
            step = next(other for other in STAGES.values() if other.artefact.startswith(made))
            if step.name != "distill":
                assert "up to date" in runs.run(run_dir, *step.arguments).stderr
    assert content(run_dir) == before
    must_finish(runs, run_dir, stage)


def test_a_cache_that_can_only_be_read_teaches_a_student_elsewhere(runs: Runs, tmp_path: Path) -> None:
    stage = STAGES["distill"]
    run_dir = runs.before(stage, tmp_path / "run")
    with mount(run_dir / "cache", "--bind", run_dir / "cache"):
        assert mounted("-o", "remount,bind,ro", run_dir / "cache")
        must_finish(runs, run_dir, stage)


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("tokenize", "data"),
        ("teacher", "data/train.npy"),
        ("teacher", "teacher"),
        ("dump-logits", "teacher/model.safetensors"),
        ("dump-logits", "cache"),
        ("distill", "cache/cache.json"),
        ("distill", "cache/tables.h5"),
        ("distill", "cache/train-00001.h5"),
        ("distill", "students"),
        ("sweep", "sweeps"),
        ("export hf", "students/student/model.safetensors"),
        ("export hf", "exports"),
    ],
)
def test_what_permissions_forbid_is_told_with_its_place(runs: Runs, tmp_path: Path, name: str, closed: str) -> None:
    stage = STAGES[name]
    run_dir = runs.before(stage, tmp_path / "run")
    path = run_dir / closed
    if not path.exists():
        path.mkdir()
    path.chmod(0o500 if path.is_dir() else 0)
    message = one_message(runs.run(run_dir, *stage.arguments, setup=AS_OTHERS))
    assert "ermission denied" in message or "unable to open database file" in message
    assert str(path) in message
    path.chmod(0o755 if path.is_dir() else 0o644)
    must_finish(runs, run_dir, stage)


def when(opened: str, nth: int, then: str) -> str:
    """For a run's setup: what to do when a file of this name is opened for the n-th time."""
    return f"""
import os, sys
times = [0]
def on_open(event, arguments):
    if event == "open" and str(arguments[0]).endswith({opened!r}):
        times[0] += 1
        if times[0] == {nth}:
            {then}
sys.addaudithook(on_open)
"""


ALL = ("deleted", "truncated", "replaced")
VANISHING = [
    ("tokenize", "corpus/30.txt", "corpus/29.txt", 2, ALL),
    ("teacher", "data/validation.npy", "teacher/metrics.jsonl", 1, ("deleted", "truncated")),
    ("teacher", "data/tokenizer.json", "teacher/metrics.jsonl", 2, ("deleted",)),
    ("dump-logits", "teacher/model.safetensors", "teacher/config.json", 2, ALL),
    ("distill", "cache/train-00000.h5", "cache/tables.h5", 1, ALL),
    ("distill", "cache/validation-00000.h5", "student/metrics.jsonl", 1, ALL),
    ("distill", "cache/tables.h5", "cache/cache.json", 3, ALL),
    ("sweep", "cache/validation-00000.h5", "metrics.jsonl", 1, ("truncated",)),
]


@pytest.mark.parametrize(
    ("name", "lost", "opened", "nth", "how"), [(*row[:4], how) for row in VANISHING for how in row[4]]
)
def test_a_file_that_vanishes_or_changes_under_its_reader(
    runs: Runs, tmp_path: Path, name: str, lost: str, opened: str, nth: int, how: str
) -> None:
    """Deleted, cut in half where it is, or replaced by as many other bytes; then put back."""
    stage = STAGES[name]
    run_dir = runs.before(stage, tmp_path / "run")
    path = runs.corpus.parent / lost if lost.startswith("corpus") else run_dir / lost
    original = path.read_bytes()
    then = {
        "deleted": f"os.remove({str(path)!r})",
        "truncated": f"os.truncate({str(path)!r}, {len(original) // 2})",
        "replaced": f"os.truncate({str(path)!r}, 0); os.truncate({str(path)!r}, {len(original)})",
    }[how]
    ended = runs.run(run_dir, *stage.arguments, setup=when(opened, nth, then))
    assert not path.exists() or path.read_bytes() != original, "it was not opened so often"
    path.write_bytes(original)
    if ended.code == 0:  # the file was open by then, or its bytes were read
        print(json.dumps({"survived": name, "lost": lost, "how": how}))
    else:
        message = one_message(ended)
        assert (stage.name == "tokenize" and "changed while they were read" in message) or Path(lost).name in message
        assert stage.name not in {"distill", "sweep"} or "run `tristill cache repair`" in message
    must_finish(runs, run_dir, stage)


_CLOCK = r"""
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long calls;
int clock_gettime(clockid_t clock, struct timespec *now) {
    int code = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec -= 10 * __sync_add_and_fetch(&calls, 1);
    return code;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now) *now = exact.tv_sec;
    return exact.tv_sec;
}
"""


STEPS = ("tokenize", "teacher", "dump-logits", "distill")
CLOCKED = (*STEPS, "sweep", "export hf")


@pytest.mark.slow
def test_a_clock_that_goes_back_changes_nothing(runs: Runs, tmp_path: Path) -> None:
    """Each look at the time of day finds it 10 s earlier than the one before; files that were read are of tomorrow."""
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(_CLOCK)
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    environment = {**ENVIRONMENT, "LD_PRELOAD": str(library)}
    run_dir, told = tmp_path / "run", []
    with Commands(tmp_path, environment=environment, cwd=ROOT) as commands:
        for name in CLOCKED:
            stage = STAGES[name]
            ended = runs.run(run_dir, *stage.arguments, commands=commands)
            assert ended.code == 0, ended.stderr
            told += [ended.stderr, ended.stdout]
            for path in (run_dir / stage.artefact).rglob("*"):
                os.utime(path, (time.time() + 86_400,) * 2)
        for name in STEPS:
            assert "up to date" in runs.run(run_dir, *STAGES[name].arguments, commands=commands).stderr
    for name in CLOCKED:
        assert runs.final(run_dir, STAGES[name]) == runs.final(runs.whole, STAGES[name])
    assert not re.search(r"(?<![\w.e-])-\d", "\n".join(told)), told
    for path in run_dir.rglob("*.json*"):
        if path.name not in {"tokenizer.json", "cache.json"}:
            text = path.read_text()
            assert not re.search(r'"(elapsed_s|earlier_s|positions_per_s|peak_rss_mib)": -', text), path
