"""A record names what was read: inputs are held while a step reads them, and compared at its end."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT, tristill
from tristill.pipeline.config import load_config
from tristill.pipeline.errors import BusyError, MovedError, StaleError
from tristill.pipeline.provenance import locked, read_provenance
from tristill.pipeline.reading import reading
from tristill.pipeline.runner import execute
from tristill.pipeline.step import Step
from tristill.pipeline.steps import Distill, DumpLogits, Teacher
from tristill.pipeline.workspace import Workspace

Change = Callable[[Path], None]


def workspace(run_dir: Path, *changes: str) -> Workspace:
    return Workspace(load_config(ROOT / "configs" / "test.toml", changes), run_dir)


def new_student(run: Workspace) -> Step:
    return Distill(run, "new")


def other_bytes(path: Path) -> None:
    """In place, with the times of before: as bad as it gets."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def another_folder(path: Path) -> None:
    """The folder replaced as a whole, so that no lock on it is in the way."""
    path.parent.rename(path.parent.with_name("before"))
    shutil.copytree(path.parent.with_name("before"), path.parent)
    other_bytes(path)


def same_bytes(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def gone(path: Path) -> None:
    shutil.rmtree(path.parent)


def built(step: Step, change: Change, path: Path) -> Step:
    """Build a step of which only the reading is real: its input changes while it is at work."""

    class Quick(type(step)):  # type: ignore[misc]
        def build(self) -> str:
            change(path)
            for name in self.products:
                (self.folder / name).write_text('{"any": 1}')
            return "f" * 64

    quick = Quick.__new__(Quick)
    quick.__dict__.update(step.__dict__)
    execute(quick)
    return quick


TOP_K = "cache.profile={kind='plain_topk'}"
ONLINE = "distill.targets=online"
READERS: dict[str, tuple[Callable[[Workspace], Step], str, tuple[str, ...]]] = {
    "teacher of tokens": (Teacher, "data/train.npy", ()),
    "given teacher": (Teacher, "../given/model.safetensors", ("teacher={path='GIVEN'}",)),
    "dump of tokens": (DumpLogits, "data/validation.npy", ()),
    "dump of a teacher": (DumpLogits, "teacher/model.safetensors", ()),
    "dump of an ensemble": (DumpLogits, "../given/model.safetensors", ("cache.ensemble=[{path='GIVEN'}]", TOP_K)),
    "cached student": (new_student, "cache/train-00000.h5", ()),
    "student of caches": (new_student, "../further/cache.json", ("distill.caches=[{dir='FURTHER'}]",)),
    "online student": (new_student, "teacher/config.json", (ONLINE,)),
    "online student of tokens": (new_student, "data/train.npy", (ONLINE,)),
    "student from its teacher": (new_student, "teacher/model.safetensors", ("student.init=teacher",)),
    "given student": (new_student, "../given/model.safetensors", ("student={path='GIVEN',init='given'}",)),
}
"""Steps of every kind, the file of an input that changes, and settings."""


@pytest.mark.parametrize("kind", READERS)
def test_an_input_that_changes_while_it_is_read_is_refused_and_nothing_made_of_it_is_kept(
    copied_run: Path, kind: str
) -> None:
    step_of, name, settings = READERS[kind]
    given, further = copied_run.parent / "given", copied_run.parent / "further"
    shutil.copytree(copied_run / "teacher", given)
    shutil.copytree(copied_run / "cache", further)
    settings = tuple(text.replace("GIVEN", str(given)).replace("FURTHER", str(further)) for text in settings)
    step = step_of(workspace(copied_run, *settings))
    shutil.rmtree(step.folder, ignore_errors=True)
    path = (copied_run / name).resolve()
    with pytest.raises(MovedError, match=rf"changed while it was read \(.*{path.name}.*run the same command again"):
        built(step, another_folder if "tokens" in kind else other_bytes, path)
    assert not step.folder.exists()


@pytest.mark.parametrize("change", [same_bytes, gone])
def test_an_input_that_has_the_same_bytes_or_is_gone_is_what_was_read(copied_run: Path, change: Change) -> None:
    before = Teacher(workspace(copied_run)).fingerprint()
    shutil.rmtree(copied_run / "cache")
    step = built(DumpLogits(workspace(copied_run)), change, copied_run / "teacher" / "model.safetensors")
    record = step.provenance()
    assert record is not None
    assert (record.status, record.inputs["teacher"]) == ("complete", before)


def test_a_record_does_not_tell_of_what_came_while_the_step_was_at_work(copied_run: Path) -> None:
    teacher = copied_run / "teacher"
    teacher.rename(copied_run / "elsewhere")

    def arrives(_: Path) -> None:
        (copied_run / "elsewhere").rename(teacher)

    record = built(Distill(workspace(copied_run), "new"), arrives, teacher).provenance()
    assert record is not None
    assert sorted(record.inputs) == ["cache", "data"]


@pytest.mark.parametrize("name", ["teacher/model.safetensors", "data/train.npy"])
def test_an_artefact_whose_files_are_not_those_of_its_record_is_not_read(copied_run: Path, name: str) -> None:
    shutil.rmtree(copied_run / "cache")
    other_bytes(copied_run / name)
    with pytest.raises(StaleError, match=rf"its files are not those that provenance\.json tells of.*{Path(name).name}"):
        execute(DumpLogits(workspace(copied_run)))
    assert not (copied_run / "cache").exists()


def test_what_a_step_reads_is_not_made_anew_meanwhile_but_may_be_read_by_others(
    copied_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = workspace(copied_run)
    teacher = Teacher(run)
    before = (copied_run / "teacher" / "model.safetensors").stat()
    with reading(DumpLogits(run).reads()), reading(Distill(run, "new").reads()):
        for step in (teacher, DumpLogits(run)):
            with pytest.raises(BusyError, match="another process is working on it or reads it"):
                execute(step, force=True)
            execute(step)
            assert "up to date" in capsys.readouterr().err
    assert (copied_run / "teacher" / "model.safetensors").stat() == before
    with locked(copied_run / "teacher"), pytest.raises(BusyError), reading(DumpLogits(run).reads()):
        pytest.fail("it is being changed")


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (("evaluate", "student"), "students/student"),
        (("evaluate", "student"), "cache"),
        (("export", "student", "--format", "hf"), "students/student"),
        (("export", "student", "--format", "hf"), "exports/student"),
    ],
)
def test_what_another_process_changes_is_neither_evaluated_nor_exported(
    copied_run: Path, command: tuple[str, ...], folder: str
) -> None:
    (copied_run / folder).mkdir(parents=True, exist_ok=True)
    with locked(copied_run / folder):
        refused = tristill(*command, "--config", "configs/test.toml", "--run-dir", str(copied_run))
    assert (refused.code, refused.stdout) == (1, "")
    assert f"{folder}: another process is working on it or reads it" in refused.stderr
    assert not (copied_run / "evaluation.json").exists()


@pytest.mark.parametrize("has_run", [False, True])
def test_a_refused_step_leaves_nothing_behind(copied_run: Path, tmp_path: Path, *, has_run: bool) -> None:
    run_dir = copied_run if has_run else tmp_path / "new"
    before = sorted(run_dir.rglob("*")), (copied_run / "config.toml").read_bytes()
    refused = tristill(
        *("distill", "--config", "configs/test.toml", "--run-dir", str(run_dir), "--name", "x"),
        *("--targets", "cached", "--set", "distill.hidden.layers={1=9}"),
    )
    assert refused.code == 1
    assert (sorted(run_dir.rglob("*")), (copied_run / "config.toml").read_bytes()) == before
    assert run_dir.exists() == has_run


def test_a_torn_summary_is_not_taken_for_a_finished_student(copied_run: Path) -> None:
    student = Distill(workspace(copied_run), "student")
    assert student.is_complete()
    (student.folder / "summary.json").write_bytes(b"")
    assert not student.is_complete()
    assert read_provenance(student.folder) is not None
