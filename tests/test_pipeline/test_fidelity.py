"""`tristill cache fidelity` and `cache.fidelity`: what is promised is measured, and what is measured is kept."""

import json
from collections.abc import Callable
from pathlib import Path

from conftest import Outcome, tristill
from tristill.cache import open_cache
from tristill.cache.manifest import load_manifest


def test_fidelity_of_a_cache_is_printed_with_the_curve_it_was_picked_from(finished_run: Path) -> None:
    where = ("--config", "configs/test.toml", "--run-dir", str(finished_run))
    outcome = tristill("cache", "fidelity", "--temperature", "1", "--temperature", "3", *where)
    assert outcome.code == 0, outcome.stderr
    assert "| tau | angle, degrees | norm ratio | KL, nats | positions |" in outcome.stdout
    assert "calibration on " in outcome.stdout
    assert "the teacher with 15% noise on its weights" in outcome.stdout
    measured = json.loads(tristill("cache", "fidelity", "--student", "no-teacher", "--json", *where).stdout)
    assert [row["temperature"] for row in measured] == [1, 2, 5]
    assert all(row["angle_deg"] < 20 and row["kl_nats"] < 0.05 and row["refused"] is None for row in measured)
    missing = tristill("cache", "fidelity", "--student", "nobody", *where)
    assert missing.code == 1
    assert "nobody" in missing.stderr


def test_fidelity_needs_the_teacher_that_made_the_cache(copied_run: Path, tmp_path: Path) -> None:
    where = ("--config", "configs/test.toml", "--run-dir", str(copied_run))
    elsewhere = tristill("cache", "fidelity", str(copied_run / "cache"), "--run-dir", str(tmp_path / "none"))
    assert elsewhere.code == 1
    assert "no teacher to compare the cache with; run `tristill teacher`" in elsewhere.stderr
    config = copied_run / "teacher" / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    other = tristill("cache", "fidelity", *where)
    assert other.code == 1
    assert "was made by another teacher" in other.stderr


def test_a_target_is_met_by_the_cheapest_setting_and_the_curve_is_kept(copied_run: Path) -> None:
    arguments = ("--config", "configs/test.toml", "--run-dir", str(copied_run))
    target = ("--set", "cache.fidelity={max_gradient_angle_deg={1=8.0, 2=10.0}}")
    where = ("--set", f"cache.dir={copied_run / 'picked'}")
    outcome = tristill("dump-logits", *arguments, *target, *where)
    assert outcome.code == 0, outcome.stderr
    assert "calibration: picked step" in outcome.stderr
    assert "for at most 8 degrees at tau 1, 10 degrees at tau 2" in outcome.stderr
    calibration = load_manifest(copied_run / "picked").calibration
    assert calibration is not None
    assert calibration.chosen is not None
    chosen = calibration.points[calibration.chosen]
    assert chosen.angle_deg["1"] <= 8
    assert chosen.angle_deg["2"] <= 10
    cheaper = [point for point in calibration.points if point.bytes_per_position < chosen.bytes_per_position]
    assert all(point.angle_deg["1"] > 8 or point.angle_deg["2"] > 10 for point in cheaper)
    assert open_cache(copied_run / "picked").spec.profile.step == chosen.settings["step"]  # type: ignore[union-attr]


def test_bytes_that_do_not_suffice_are_refused_with_the_nearest(copied_run: Path) -> None:
    arguments = ("--config", "configs/test.toml", "--run-dir", str(copied_run))
    where = ("--set", f"cache.dir={copied_run / 'other'}")
    tight = tristill("dump-logits", *arguments, *where, "--set", "cache.fidelity={bytes_per_position=1.0}")
    assert tight.code == 1
    assert "cache.fidelity: no setting gives at most 1 bytes/position; the nearest of" in tight.stderr
    dense = tristill(
        "dump-logits",
        *arguments,
        *where,
        "--set",
        "cache.fidelity={bytes_per_position=99.0}",
        "--set",
        "cache.profile={kind='dense'}",
    )
    assert dense.code == 1
    assert "profile dense has no setting to pick" in dense.stderr


def test_a_killed_dump_goes_on_with_the_tables_it_has(step: Callable[..., Outcome], copied_run: Path) -> None:
    """The finished cache equals the uninterrupted one, byte for byte, tables and calibration too."""
    before = {path.name: path.read_bytes() for path in (copied_run / "cache").iterdir() if path.suffix != ".json"}
    (copied_run / "cache" / "cache.json").unlink()
    (copied_run / "cache" / "train-00001.h5").unlink()
    outcome = step("dump-logits", run_dir=copied_run)
    assert outcome.code == 0, outcome.stderr
    assert before == {
        path.name: path.read_bytes() for path in (copied_run / "cache").iterdir() if path.suffix != ".json"
    }
    for path in (copied_run / "cache").glob("*.h5"):
        path.unlink()
    (copied_run / "cache" / "cache.json").unlink()
    assert step("dump-logits", "--force", run_dir=copied_run).code == 0
    assert before == {
        path.name: path.read_bytes() for path in (copied_run / "cache").iterdir() if path.suffix != ".json"
    }
