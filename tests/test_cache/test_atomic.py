"""A file is there whole under its name or not at all, whoever else writes it at the same time."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conftest import ROOT
from tristill.cache.atomic import atomic_file, partial_of, write_atomically


def test_writers_of_one_file_at_the_same_time_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    with atomic_file(path) as first:
        first.write(b"the first ")
        with atomic_file(path) as second:
            second.write(b"the second")
        assert path.read_bytes() == b"the second"
        with pytest.raises(ZeroDivisionError), atomic_file(path) as third:
            third.write(bytes(1 // 0))
        assert path.read_bytes() == b"the second"
        first.write(b"is whole")
    assert path.read_bytes() == b"the first is whole"
    assert list(tmp_path.iterdir()) == [path]


def test_many_threads_that_replace_a_file_leave_it_whole(tmp_path: Path) -> None:
    path, contents = tmp_path / "summary.json", [bytes([n]) * 5000 for n in range(8)]
    seen: list[bytes] = []

    def replace(content: bytes) -> None:
        for _ in range(20):
            write_atomically(path, content)
            seen.append(path.read_bytes())

    threads = [threading.Thread(target=replace, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 160
    assert set(seen) <= set(contents)
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_replaced_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    code = f"""
import sys
from pathlib import Path
from tristill.cache.atomic import atomic_file
with atomic_file(Path({str(path)!r})) as file:
    file.write(b"half of it")
    file.flush()
    print("begun", flush=True)
    sys.stdin.read()
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "begun\n"
    write_atomically(path, b"ours")
    assert partial_of(path).read_bytes() == b"half of it", "its writer lives"
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    write_atomically(path, b"ours again")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"config.toml": b"ours again"}


def test_a_folder_that_has_the_partial_name_is_left_alone(tmp_path: Path) -> None:
    partial_of(tmp_path / "a").mkdir()
    write_atomically(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert partial_of(tmp_path / "a").is_dir()
