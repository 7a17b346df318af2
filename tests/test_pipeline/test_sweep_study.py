"""Studies that cannot be read, and what --force may forget."""

import threading
import time
from pathlib import Path

import pytest

from conftest import ROOT
from tristill.pipeline.errors import BusyError, StudyError
from tristill.pipeline.provenance import locked
from tristill.pipeline.sweep.config import load_sweep
from tristill.pipeline.sweep.results import SweepResults
from tristill.pipeline.sweep.run import _clear, run_sweep
from tristill.pipeline.sweep.student import Base
from tristill.pipeline.sweep.study import open_study

CONFIG = ROOT / "configs" / "sweeps" / "test.toml"
ONE_STUDENT = ("vary.distill.training.steps=[2]", "vary.distill.alpha=[0.5]", "seeds=[]",
               "distill.training.warmup_steps=1", "distill.training.batch_windows=2")  # fmt: skip


def sweep(cache: Path, run_dir: Path, **options: bool) -> SweepResults:
    found, of_base = load_sweep(CONFIG, (*ONE_STUDENT, f"cache.dir={str(cache)!r}"))
    return run_sweep(found, Base(found, CONFIG, of_base, run_dir), **options)


def test_a_study_that_cannot_be_read_is_named_and_force_begins_anew(finished_run: Path, tmp_path: Path) -> None:
    cache, run_dir = finished_run / "cache", tmp_path / "run"
    first = sweep(cache, run_dir)
    database = run_dir / "sweeps" / "test" / "study.db"
    whole = database.read_bytes()
    torn = whole[:4096] + bytes([255]) * 8192 + whole[4096 + 8192 :]
    for broken in (b"no data base " * 1000, whole[:5000], torn):
        database.write_bytes(broken)
        with pytest.raises(StudyError, match=r"study.db: the study cannot be read.*or begin anew with --force"):
            sweep(cache, run_dir)
    anew = sweep(cache, run_dir, force=True)
    assert [trial.validation for trial in anew.trials] == [trial.validation for trial in first.trials]


def test_force_waits_for_the_folder_of_the_sweep_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = load_sweep(CONFIG, ())
    base = Base(found, CONFIG, (), tmp_path)
    student = base.folder / "students" / "one"
    student.mkdir(parents=True)
    clearing = threading.Thread(target=_clear, args=(found, base), kwargs={"take_over": False})
    with locked(base.folder):
        clearing.start()
        time.sleep(1.3)
        assert student.is_dir()
    clearing.join()
    assert not student.exists()
    assert f"waiting for another process that holds {base.folder}: 1 s" in capsys.readouterr().err


def test_force_does_not_forget_trials_that_run_elsewhere(tmp_path: Path) -> None:
    found, _ = load_sweep(CONFIG, (f"storage=sqlite:///{tmp_path}/shared.db",))
    here, elsewhere = (Base(found, CONFIG, (), tmp_path / name) for name in ("here", "elsewhere"))
    with open_study(found, "test", elsewhere.folder, {}, take_over=False) as study:
        trial = study.next()
        assert trial is not None
        study.take(trial)
    for _ in range(2):  # also where nothing of the sweep was before
        with pytest.raises(
            BusyError, match=r"run in .*elsewhere/sweeps/test, which --force would forget; .*--take-over"
        ):
            _clear(found, here, take_over=False)
    with open_study(found, "test", here.folder, {}, take_over=False) as study:
        assert next(trial.state.name for trial in study.trials()) == "RUNNING"
    _clear(found, elsewhere, take_over=False)
    with open_study(found, "test", elsewhere.folder, {}, take_over=False) as study:
        assert study.trials() == []
        again = study.next()
        assert again is not None
        study.take(again)
    _clear(found, here, take_over=True)
    with open_study(found, "test", here.folder, {"is": "another"}, take_over=False) as study:
        assert study.trials() == []


def test_a_study_stays_in_its_folder_whatever_the_name_of_that(tmp_path: Path) -> None:
    found, _ = load_sweep(CONFIG, ())
    names = (
        "what?one",
        "what?two",
        "a#b",
        "100%",
        "x%3Fy",
        "{n}",
        "a&mode=memory",
        ":memory:",
        "file:x",
    )
    for name in names:
        base = Base(found, CONFIG, (), tmp_path / name)
        with open_study(found, name.encode("ascii", "replace").decode(), base.folder, {}, take_over=False) as study:
            assert study.study.user_attrs == {"identity": {}}
            assert study.trials() == []
        assert (base.folder / "study.db").stat().st_size > 0
        _clear(found, base, take_over=False)
        assert not (base.folder / "study.db").exists()
    assert len(list(tmp_path.iterdir())) == len(names)
