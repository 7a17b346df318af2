"""What counts as a change between a record and the settings of now, and what a record says of time."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import ENVIRONMENT, ROOT
from tristill.pipeline.config import load_config
from tristill.pipeline.provenance import Provenance, differences, locked, read_provenance, write_provenance
from tristill.pipeline.runner import build_held
from tristill.pipeline.tokenize_step import Tokenize
from tristill.pipeline.workspace import Workspace


def record(settings: dict[str, Any]) -> Provenance:
    return Provenance(
        step="dump-logits", status="complete", inputs={"teacher": "a" * 64}, settings=settings, command="", versions={}
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"cache": {"a": 1}}, {"cache": {"a": 2}}, ["cache.a: was 1, is 2"]),
        ({"cache": {}}, {"cache": {"a": None}}, []),
        ({"cache": {"hidden": {}}}, {"cache": {"hidden": {"output": "residual"}}}, []),
        (
            {"cache": {"hidden": {}}},
            {"cache": {"hidden": {"output": "mlp"}}},
            ["cache.hidden.output: was 'residual', is 'mlp'"],
        ),
        ({"teacher": {"a": 1}}, {"teacher": {"a": 1}}, []),
        ({"data": {"token": "hidden"}}, {"data": {"token": True}}, ["data.token: was ..., is True"]),
    ],
)
def test_a_setting_that_a_record_is_too_old_for_is_what_it_meant_then(
    old: dict[str, Any], new: dict[str, Any], expected: list[str]
) -> None:
    assert differences(record(old), new, {"teacher": "a" * 64}) == expected


def test_an_input_that_changed_is_named_and_one_that_is_not_here_is_not() -> None:
    assert differences(record({}), {}, {"teacher": "b" * 64}) == [f"input teacher: was {'a' * 12}, is {'b' * 12}"]
    assert differences(record({}), {}, {}) == []


class SlowStep(Tokenize):
    """Takes its seconds, leaves something to go on from, and then ends as it is told."""

    def __init__(self, folder: Path, seconds: float, end: str | None = None) -> None:
        super().__init__(Workspace(load_config(ROOT / "configs" / "test.toml"), folder))
        self._seconds, self._end = seconds, end
        self.folder.mkdir(exist_ok=True)

    def build(self) -> str:
        time.sleep(self._seconds)
        (self.folder / "synthetic").mkdir(exist_ok=True)
        (self.folder / "synthetic" / "part-0.jsonl").touch()
        if self._end == "interrupted":
            raise KeyboardInterrupt
        if self._end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        for name in self.products:
            (self.folder / name).touch()
        return "f" * 64


def build(folder: Path, seconds: float, end: str | None = None) -> Provenance:
    if end == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            build_held(SlowStep(folder, seconds, end))
    elif end == "killed":
        code = f"from test_provenance import *; build_held(SlowStep(Path({str(folder)!r}), {seconds}, 'killed'))"
        path = os.pathsep.join(str(place) for place in (ROOT, ROOT / "tests", Path(__file__).parent))
        done = subprocess.run(
            [sys.executable, "-c", code], env={**ENVIRONMENT, "PYTHONPATH": path}, cwd=ROOT, check=False
        )
        assert done.returncode == -signal.SIGKILL
    else:
        build_held(SlowStep(folder, seconds))
    found = read_provenance(folder / "data")
    assert found is not None
    return found


def test_seconds_of_a_step_that_was_interrupted_are_those_of_all_its_processes(tmp_path: Path) -> None:
    first = build(tmp_path, 0.2, "interrupted")
    assert (first.status, first.elapsed_s, first.is_resumed) == ("building", None, False)
    second = build(tmp_path, 0.1, "interrupted")
    assert (second.earlier_s or 0) >= (first.earlier_s or 0) + 0.1 >= 0.3
    last = build(tmp_path, 0.1)
    assert (last.status, last.is_resumed) == ("complete", False)
    assert (last.elapsed_s or 0) >= (second.earlier_s or 0) + 0.1


def test_seconds_of_a_process_that_was_killed_are_said_to_be_missing(tmp_path: Path) -> None:
    first = build(tmp_path, 0.2, "interrupted")
    assert build(tmp_path, 0.0, "killed").earlier_s == first.earlier_s, "what is known"
    last = build(tmp_path, 0.0)
    assert last.is_resumed
    assert (last.elapsed_s or 0) >= (first.earlier_s or 0) >= 0.2


@pytest.mark.parametrize("then", [None, "interrupted"])
def test_a_first_process_that_was_killed_is_not_forgotten(tmp_path: Path, then: str | None) -> None:
    build(tmp_path, 0.0, "killed")
    assert build(tmp_path, 0.0, then).is_resumed
    assert build(tmp_path, 0.0).is_resumed


def test_a_step_that_begins_from_nothing_counts_only_itself(tmp_path: Path) -> None:
    first = build(tmp_path, 0.0, "interrupted")
    write_provenance(tmp_path / "data", first.model_copy(update={"earlier_s": 1e6}))
    (tmp_path / "data" / "synthetic" / "part-0.jsonl").unlink()
    found = build(tmp_path, 0.0)
    assert found.elapsed_s is not None
    assert (found.elapsed_s < 1e5, found.is_resumed) == (True, False)


def test_a_file_system_without_locks_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refused)
    expected = f"this file system has no locks of folders (Function not implemented): '{tmp_path}'"
    with pytest.raises(OSError, match=re.escape(expected)), locked(tmp_path):
        pass
