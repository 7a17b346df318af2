"""`tristill cache repair`, `peek` and `info`, as a user runs them, on a cache that a run has made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ENVIRONMENT, ROOT, Outcome, tristill

Contents = dict[str, bytes]


@pytest.fixture
def cache(copied_run: Path) -> Path:
    """The cache of a run that may be broken; the run's own config.toml lies beside it."""
    return copied_run / "cache"


@pytest.fixture
def lone_cache(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the cache, far from teacher and corpus, without a record of who made it."""
    shutil.copytree(finished_run / "cache", tmp_path / "lone")
    (tmp_path / "lone" / "provenance.json").unlink()
    return tmp_path / "lone"


def contents(folder: Path) -> Contents:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, position: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


def repair(cache: Path, *arguments: str) -> Outcome:
    return tristill("cache", "repair", str(cache), *arguments)


def sha256_recorded(cache: Path, name: str) -> str:
    shards = json.loads((cache / "cache.json").read_text())["shards"]
    return str(next(shard["sha256"] for shard in shards if shard["name"] == name))


# Repair


def test_repair_of_a_whole_cache_touches_nothing(cache: Path) -> None:
    before = {path: path.stat() for path in cache.iterdir()}
    outcome = repair(cache)
    assert (outcome.code, outcome.stdout) == (0, f"{cache}: nothing to repair, every byte is as it was written\n")
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == {
        path: found.st_mtime_ns for path, found in before.items()
    }
    outcome = repair(cache / "nowhere")
    assert outcome.code == 1
    assert "nowhere: found no cache; run `tristill dump-logits` to make one" in outcome.stderr


@pytest.mark.parametrize("damage", ["lost", "empty", "broken JSON", "a field too many"])
def test_a_manifest_is_made_again_byte_for_byte_from_the_shards_alone(lone_cache: Path, damage: str) -> None:
    before, manifest = contents(lone_cache), lone_cache / "cache.json"
    damaged = {
        "empty": b"",
        "broken JSON": before["cache.json"][:-1],
        "a field too many": b'{"more":1,' + before["cache.json"][1:],
    }
    manifest.write_bytes(damaged.get(damage, b""))
    if damage == "lost":
        manifest.unlink()
    outcome = repair(lone_cache)
    num_shards = len(list(lone_cache.glob("*-*.h5")))
    assert (outcome.code, outcome.stdout) == (0, f"cache.json: made again from the {num_shards} shards\n")
    assert contents(lone_cache) == before


@pytest.mark.parametrize("what", ["sha256", "teacher_fingerprint", "tokenizer_fingerprint", "file_bytes"])
def test_a_wrong_digit_in_the_manifest_is_told_from_damaged_shards(cache: Path, what: str) -> None:
    before, manifest = contents(cache), cache / "cache.json"
    text = manifest.read_text()
    start = text.index(f'"{what}":') + len(what) + 3
    place = start + 1 if text[start] == '"' else start
    manifest.write_text(text[:place] + ("1" if text[place] != "1" else "2") + text[place + 1 :])
    (cache.parent / "teacher" / "model.safetensors").unlink()
    outcome = repair(cache)
    assert outcome.code == 0, outcome.stderr
    num_shards = len(list(cache.glob("*-*.h5")))
    assert outcome.stdout == f"cache.json: did not fit the {num_shards} shards, which are whole; made again from them\n"
    assert contents(cache) == before


def test_a_wrong_digit_in_the_calibration_is_put_right_beside_other_damage(cache: Path) -> None:
    if not (cache / "tables.h5").exists():
        pytest.skip("the profile of the test config is not calibrated")
    before, manifest = contents(cache), cache / "cache.json"
    flip(cache / "train-00000.h5")
    place = manifest.read_text().index('"bytes_per_position":') + 21
    flip(manifest, place)
    outcome = repair(cache)
    assert outcome.stdout.splitlines() == [
        "cache.json: its calibration taken from tables.h5 again",
        "train-00000.h5: written again by the teacher, with the SHA-256 that cache.json holds",
    ]
    assert contents(cache) == before


def test_damaged_and_missing_files_are_written_again_byte_for_byte(cache: Path) -> None:
    before = contents(cache)
    flip(cache / "train-00001.h5")
    (cache / "validation-00000.h5").unlink()
    (cache / "tokenizer.json").write_text("{}")
    verified = tristill("cache", "verify", str(cache))
    assert (verified.code, len(verified.stdout.splitlines())) == (1, 3)
    assert f"3 damaged files; `tristill cache repair {cache}` mends what can be mended" in verified.stderr
    outcome = repair(cache)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.splitlines() == [
        f"tokenizer.json: copied from {cache.parent / 'data' / 'tokenizer.json'}",
        "train-00001.h5: written again by the teacher, with the SHA-256 that cache.json holds",
        "validation-00000.h5: written again by the teacher, with the SHA-256 that cache.json holds",
    ]
    assert contents(cache) == before
    assert "up to date" in tristill("dump-logits", "--config", str(cache.parent / "config.toml")).stderr


def test_tables_are_fitted_again_byte_for_byte(cache: Path) -> None:
    if not (cache / "tables.h5").exists():
        pytest.skip("the profile of the test config has no tables")
    before = contents(cache)
    for damage in (flip, Path.unlink):
        damage(cache / "tables.h5")
        outcome = repair(cache)
        assert outcome.stdout == "tables.h5: written again by the teacher, with the SHA-256 that cache.json holds\n"
        assert contents(cache) == before


def test_without_the_teacher_the_rest_is_repaired_and_it_says_what_is_needed(cache: Path) -> None:
    before, run = contents(cache), cache.parent
    flip(cache / "train-00000.h5")
    damaged = (cache / "train-00000.h5").read_bytes()
    (cache / "tokenizer.json").unlink()
    expected = json.loads(before["cache.json"])["spec"]["teacher_fingerprint"]
    (run / "teacher" / "model.safetensors").rename(run / "weights")
    outcome = repair(cache)
    assert outcome.code == 1
    assert outcome.stdout == f"tokenizer.json: copied from {run / 'data' / 'tokenizer.json'}\n"
    assert f"{cache}: could not repair train-00000.h5: it takes what made them:" in outcome.stderr
    assert f"{run / 'teacher'}: found no teacher, expected the one with fingerprint {expected}" in outcome.stderr
    assert "name the run that has it with --config and --run-dir" in outcome.stderr
    assert contents(cache) == {**before, "train-00000.h5": damaged}
    (run / "weights").rename(run / "teacher" / "model.safetensors")
    assert repair(cache).code == 0
    assert contents(cache) == before


def test_a_cache_far_from_its_run_names_all_that_is_needed(lone_cache: Path, tmp_path: Path) -> None:
    (lone_cache / "train-00000.h5").unlink()
    flip(lone_cache / "tokenizer.json")
    before = contents(lone_cache)
    outcome = repair(lone_cache, "--config", "configs/test.toml", "--run-dir", str(tmp_path / "run"))
    assert outcome.code == 1
    assert f"tokenizer.json: is missing or damaged, and neither {tmp_path}/run/data nor" in outcome.stderr
    assert f"the token files: {tmp_path}/run/data/data.json: cannot be read as a tokenized corpus" in outcome.stderr
    assert f"{tmp_path}/run/teacher: found no teacher, expected the one with fingerprint" in outcome.stderr
    assert contents(lone_cache) == before


def test_shards_of_version_1_are_left_to_the_program_that_wrote_them(tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(ROOT / "tests" / "test_cache" / "golden" / "version-1", old)
    (old / "train-00000.h5").unlink()
    outcome = repair(old, "--config", "configs/test.toml", "--run-dir", str(tmp_path / "run"))
    assert outcome.code == 1
    assert "the program that wrote format version 1; this one writes version 2" in outcome.stderr


def test_another_teacher_data_or_setting_is_refused_by_name(cache: Path) -> None:
    (cache / "validation-00000.h5").unlink()
    before, run = contents(cache), cache.parent
    flip(run / "teacher" / "model.safetensors")
    corpus = json.loads((run / "data" / "data.json").read_text())
    corpus["splits"]["train"]["sha256"] = "0" * 64
    (run / "data" / "data.json").write_text(json.dumps(corpus))
    outcome = repair(cache, "--set", "cache.max_train_windows=399")
    assert outcome.code == 1
    assert f"{run / 'teacher'}: found a teacher with fingerprint" in outcome.stderr
    assert f"{run / 'data'}: found split train with fingerprint" in outcome.stderr
    assert "split validation" not in outcome.stderr
    assert "cache.max_train_windows: was 400, is 399" in outcome.stderr
    assert contents(cache) == before


def test_other_bytes_than_those_of_the_manifest_are_not_taken(cache: Path) -> None:
    run = cache.parent
    record = json.loads((cache / "provenance.json").read_text())
    record["versions"]["torch"] = "0.0.1"
    (cache / "provenance.json").write_text(json.dumps(record))
    (cache / "validation-00000.h5").unlink()
    flip(cache / "train-00000.h5")
    (run / "data" / "validation.npy").write_bytes((run / "data" / "train.npy").read_bytes())
    before = contents(cache)
    outcome = repair(cache)
    assert outcome.code == 1
    assert outcome.stdout == "train-00000.h5: written again by the teacher, with the SHA-256 that cache.json holds\n"
    assert (
        "could not repair validation-00000.h5: the teacher gives other bytes than those whose SHA-256" in outcome.stderr
    )
    assert "(torch 0.0.1 there, " in outcome.stderr
    assert contents(cache).keys() == before.keys()
    assert {name for name, content in contents(cache).items() if content != before[name]} == {"train-00000.h5"}


def test_settings_without_a_record_are_known_by_what_they_make(cache: Path) -> None:
    (cache / "provenance.json").unlink()
    (cache / "train-00000.h5").unlink()
    before = contents(cache)
    outcome = repair(cache, "--set", "cache.hidden_layers=[1]")
    assert outcome.code == 1
    assert f"could not repair train-00000.h5: the run in {cache.parent} makes another cache:" in outcome.stderr
    assert "hidden.layers: found [1, 2], expected [1]" in outcome.stderr
    assert contents(cache) == before
    assert repair(cache).code == 0


def test_an_unfinished_dump_is_left_to_the_dump(cache: Path) -> None:
    (cache / "cache.json").unlink()
    (cache / "train-00001.h5").unlink()
    before = contents(cache)
    outcome = repair(cache)
    assert outcome.code == 1
    assert "shards, but the cache that they belong to also has train-00001.h5; run `tristill" in outcome.stderr
    assert contents(cache) == before


def test_what_a_killed_repair_had_written_is_used_by_the_next(lone_cache: Path) -> None:
    before = contents(lone_cache)
    scratch = lone_cache / ".repair.partial"
    scratch.mkdir()
    shutil.copy(lone_cache / "train-00000.h5", scratch)
    (scratch / ".train-00001.h5.partial").write_bytes(b"half of it")
    (lone_cache / "train-00000.h5").unlink()
    outcome = repair(lone_cache)
    assert outcome.stdout == "train-00000.h5: written by a repair that was interrupted, now in its place\n"
    assert contents(lone_cache) == before


def test_the_commands_load_no_torch(lone_cache: Path) -> None:
    (lone_cache / "cache.json").unlink()
    folder = str(lone_cache)
    for command in (("repair", folder), ("verify", folder), ("info", folder), ("peek", folder)):
        check = (
            "import sys; from tristill.pipeline.cli import cli; cli.main(sys.argv[1:], standalone_mode=False); "
            "assert not {'torch', 'datasets'} & sys.modules.keys()"
        )
        subprocess.run(
            [sys.executable, "-c", check, "cache", *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, check=True
        )


def test_two_processes_do_not_repair_one_cache(lone_cache: Path) -> None:
    import fcntl

    descriptor = os.open(lone_cache, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert "lone: another process is working on it" in repair(lone_cache).stderr
    finally:
        os.close(descriptor)


# Peek


def test_peek_shows_the_text_of_a_window_and_what_the_teacher_expected(cache: Path) -> None:
    from tokenizers import Tokenizer

    from tristill.cache import open_cache

    opened = open_cache(cache)
    ids = opened.window("train", 3).input_ids[0].tolist()
    tokenizer = Tokenizer.from_file(str(opened.tokenizer_path))
    outcome = tristill(
        "cache", "peek", str(cache), "--split", "train", "--window", "3", "--positions", "4", "--top", "2"
    )
    assert outcome.code == 0, outcome.stderr
    title, _, rest = outcome.stdout.partition("\n\n")
    text, _, table = rest.rpartition("\n\n")
    header, _, *rows = table.splitlines()
    words = tokenizer.decode(ids, skip_special_tokens=False).split()
    assert "".join(text.replace("\u21b5", "").split()) == "".join(words)
    assert title == f"train, window 3 of 400, at temperature {opened.spec.profile.temperature:g}"
    assert "| position | input" in header
    assert len(rows) == 4
    for position, row in enumerate(rows):
        cells = [cell.strip() for cell in row.strip("|").replace(r"\|", "/").split("|")]
        assert cells[0] == str(position)
        for cell, token_id in zip(cells[1:3], ids[position : position + 2], strict=True):
            text = tokenizer.decode([token_id], skip_special_tokens=False)
            assert cell in {repr(text).replace("|", "/"), f"<{tokenizer.id_to_token(token_id)}>"}
        assert float(cells[3]) >= 0
        assert 0 <= float(cells[4]) <= 1


def test_peek_refuses_what_is_not_there(lone_cache: Path) -> None:
    outcome = tristill("cache", "peek", str(lone_cache), "--window", "124")
    assert outcome.code == 1
    assert "window 124: the split validation has 124 windows" in outcome.stderr
    outcome = tristill("cache", "peek", str(lone_cache), "--split", "test")
    assert outcome.code == 1
    assert "has no split test, found ['train', 'validation']" in outcome.stderr
    (lone_cache / "cache.json").unlink()
    assert "or `tristill cache repair` if only cache.json was lost" in tristill("cache", "peek", str(lone_cache)).stderr


# Info


def test_info_shows_histograms_and_where_the_cache_comes_from(finished_run: Path) -> None:
    cache = finished_run / "cache"
    info = json.loads(tristill("cache", "info", str(cache), "--json").stdout)
    record = json.loads((cache / "provenance.json").read_text())
    assert info["provenance"]["command"] == record["command"]
    assert info["provenance"]["versions"]["torch"] == record["versions"]["torch"]
    assert info["provenance"]["recorded_at"].endswith("+00:00")
    assert info["sample"]["positions"] == info["positions"]["train"]
    assert sum(info["sample"]["entropy_nats"]["counts"]) == info["sample"]["positions"]
    spent = info["bytes_per_position"]
    total = sum(info["positions"].values())
    assert spent["on disk"] * total == pytest.approx(sum(path.stat().st_size for path in cache.glob("*.h5")))
    if (cache / "tables.h5").exists():
        assert spent["tables.h5"] * total == pytest.approx((cache / "tables.h5").stat().st_size)
    text = tristill("cache", "info", str(cache)).stdout
    assert f"made by    {record['command']}" in text
    assert f"entropy of the teacher, over {info['positions']['train']:,} positions" in text
    assert "100.00% ####" in text or "% #" in text


def test_info_says_what_the_manifest_holds_when_shards_cannot_be_read(lone_cache: Path) -> None:
    (lone_cache / "train-00000.h5").unlink()
    outcome = tristill("cache", "info", str(lone_cache))
    assert outcome.code == 0
    assert "bytes/position" in outcome.stdout
    assert "no histograms: " in outcome.stdout
    assert "train-00000.h5: is missing, expected" in outcome.stdout
    assert "made by" not in outcome.stdout
    info = json.loads(tristill("cache", "info", str(lone_cache), "--json").stdout)
    assert (info["sample"], info["provenance"]) == (None, None)
