"""Ensembles by the command line: provenance, repair, and caches mixed as they are read."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from small_run import small_config

from conftest import Outcome, tristill
from tristill.cache import open_cache
from tristill.cache.hashing import fingerprint_of
from tristill.stages.models.origin import model_fingerprint

PROFILE = '{ kind = "sampled", draws = 4 }'


def on(folder: Path, name: str, *arguments: str) -> Outcome:
    return tristill(*arguments, "--config", str(folder / f"{name}.toml"), "--run-dir", str(folder / name))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first`: a teacher and its cache. `both`: another teacher, and the cache and a student of the two."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "first.toml").write_text(small_config(PROFILE))
    outcome = on(folder, "first", "run", "--until", "dump-logits")
    assert outcome.code == 0, outcome.stderr
    ensemble = f'[[cache.ensemble]]\npath = "{folder / "first" / "teacher"}"\nweight = 0.5\n'
    (folder / "both.toml").write_text(small_config(PROFILE, teacher_seed=1) + ensemble)
    shutil.copytree(folder / "first" / "data", folder / "both" / "data")
    outcome = on(folder, "both", "run")
    assert outcome.code == 0, outcome.stderr
    return folder


def test_an_ensemble_is_one_run_with_the_provenance_of_all_teachers(runs: Path) -> None:
    record = json.loads((runs / "both" / "cache" / "provenance.json").read_text())
    first, own = (model_fingerprint(runs / name / "teacher") for name in ("first", "both"))
    assert record["inputs"]["teacher 2"] == first != record["inputs"]["teacher"] == own
    found = open_cache(runs / "both" / "cache").spec.teacher_fingerprint
    assert found == fingerprint_of([[own, 1 / 1.5], [first, 0.5 / 1.5]])
    assert json.loads((runs / "both" / "students" / "student" / "summary.json").read_text())["targets"] == "cached"
    again = on(runs, "both", "dump-logits")
    assert (again.code, "up to date" in again.stderr) == (0, True)


def test_a_change_of_shares_or_of_another_teacher_is_refused(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    copied = (folder / "both.toml").read_text().replace(str(runs), str(folder))
    (folder / "both.toml").write_text(copied)
    outcome = on(folder, "both", "dump-logits", "--set", "cache.own_weight=2")
    assert outcome.code == 1
    assert "cache.ensemble: was [0.6666666666666666, 0.3333333333333333], is [0.8, 0.2]" in outcome.stderr
    other = folder / "first" / "teacher" / "config.json"
    other.write_text(other.read_text() + "\n")
    outcome = on(folder, "both", "dump-logits")
    assert outcome.code == 1
    assert "input teacher 2: was" in outcome.stderr
    outcome = on(folder, "both", "distill", "--name", "another")
    assert outcome.code == 1
    assert "the cache was made by another teacher: found fingerprint" in outcome.stderr


def test_repair_writes_a_lost_shard_of_an_ensemble_again_byte_for_byte(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    shard = folder / "both" / "cache" / "train-00000.h5"
    before = hashlib.sha256(shard.read_bytes()).hexdigest()
    shard.unlink()
    (folder / "both.toml").write_text((folder / "both.toml").read_text().replace(str(runs), str(tmp_path / "gone")))
    outcome = on(folder, "both", "cache", "repair")
    assert outcome.code == 1
    assert f"{tmp_path / 'gone' / 'first' / 'teacher'}: found no ensemble, expected the one with" in outcome.stderr
    (folder / "both.toml").write_text((runs / "both.toml").read_text())
    outcome = on(folder, "both", "cache", "repair")
    assert outcome.code == 0, outcome.stderr
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == before


def test_two_caches_are_mixed_as_they_are_read_and_judged_so_again(runs: Path, tmp_path: Path) -> None:
    further = tmp_path / "cache"
    shutil.copytree(runs / "first" / "cache", further)
    mixing = ("--set", f'distill.caches=[{{dir="{further}", weight=3}}]', "--name", "mixed")
    outcome = on(runs, "both", "distill", *mixing)
    assert outcome.code == 0, outcome.stderr
    summary = json.loads((runs / "both" / "students" / "mixed" / "summary.json").read_text())
    record = json.loads((runs / "both" / "students" / "mixed" / "provenance.json").read_text())
    assert record["settings"]["distill"]["caches"] == [0.25, 0.75]
    assert summary["fingerprints"]["cache 2"] == record["inputs"]["cache 2"] != record["inputs"]["cache"]

    outcome = on(runs, "both", "evaluate", "mixed", *mixing[:2])
    assert outcome.code == 0, outcome.stderr
    evaluation = json.loads((runs / "both" / "evaluation.json").read_text())
    assert evaluation["mixed"] == summary["validation"] | {"basis": summary["basis"]}
    outcome = on(runs, "both", "evaluate", "mixed")
    assert outcome.code == 0, outcome.stderr
    evaluation = json.loads((runs / "both" / "evaluation.json").read_text())
    assert evaluation["mixed"]["kl_to_teacher_nats"] != summary["validation"]["kl_to_teacher_nats"]

    shutil.rmtree(further)
    shutil.copytree(runs / "both" / "cache", further)
    outcome = on(runs, "both", "distill", *mixing)
    assert outcome.code == 1
    assert "input cache 2: was" in outcome.stderr
    online = on(runs, "both", "distill", *mixing[:2], "--name", "online", "--targets", "online")
    assert online.code == 2
    assert "caches: are not read when targets = 'online'" in online.stderr
