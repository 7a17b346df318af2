"""Runs whose cache or corpus is at a URL, by the command line, on a real S3 server."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError
from s3_server import S3

from conftest import ENVIRONMENT, ROOT, Outcome
from tristill.pipeline.cache_info import cache_details, cache_info
from tristill.pipeline.cache_peek import peek_text
from tristill.pipeline.config import load_config
from tristill.stages.data.config import DataConfig, TextFiles
from tristill.stages.data.files import corpus_files
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.errors import CorpusError

CONFIG = ("--config", "configs/test.toml")
SHARD = ".h5"


def tristill(s3: S3, *arguments: str) -> Outcome:
    command = [sys.executable, "-m", "tristill.pipeline", *arguments]
    environment = {**ENVIRONMENT, **s3.environment}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return Outcome(done.returncode, done.stdout, done.stderr)


def started(s3: S3, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tristill.pipeline", *arguments]
    environment = {**ENVIRONMENT, **s3.environment}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def cache_files(folder: Path) -> dict[str, bytes]:
    names = {"cache.json", "tokenizer.json", "tables.h5"}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == SHARD or path.name in names}


def bound_of(cache: Path) -> int:
    """Room for two shards, which is less than the cache."""
    sizes = [path.stat().st_size for path in cache.glob("*-0*.h5")]
    assert 2 * max(sizes) < sum(sizes)
    return 2 * max(sizes)


def without_cache(finished_run: Path, run: Path) -> tuple[str, ...]:
    """Options of a run that has tokens and teacher of the finished one, and nothing else."""
    run.mkdir()
    for name in ("data", "teacher"):
        shutil.copytree(finished_run / name, run / name)
    return (*CONFIG, "--run-dir", str(run))


@pytest.fixture
def dumped(finished_run: Path, s3: S3, bucket: str) -> str:
    """The URL of the finished run's cache."""
    for name, content in cache_files(finished_run / "cache").items():
        s3.put(f"{bucket}/c/{name}", content)
    return f"s3://{bucket}/c"


def test_a_killed_dump_goes_on_elsewhere_and_a_student_of_the_url_is_that_of_the_folder(
    finished_run: Path, s3: S3, bucket: str, tmp_path: Path
) -> None:
    whole, bound = cache_files(finished_run / "cache"), bound_of(finished_run / "cache")
    at_url = ("--set", f"cache.url=s3://{bucket}/c", "--set", f"cache.local_bytes={bound}")
    puts: Counter[str] = Counter()

    def noted(method: str, path: str) -> None:
        if method == "PUT" and path.split("?", maxsplit=1)[0].endswith(SHARD):
            puts[path.split("?", maxsplit=1)[0].rsplit("/", 1)[1]] += 1

    with s3.faults(noted):  # type: ignore[arg-type]
        process = started(s3, "dump-logits", *without_cache(finished_run, tmp_path / "killed"), *at_url)
        deadline = time.monotonic() + 100
        while not s3.names(f"{bucket}/c/records") and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert "cache.json" not in s3.names(f"{bucket}/c")
        arrived = [name.removesuffix(".json") for name in s3.names(f"{bucket}/c/records")]
        before = dict(puts)
        options = without_cache(finished_run, tmp_path / "run")
        outcome = tristill(s3, "dump-logits", *options, *at_url)
    assert outcome.code == 0, outcome.stderr
    assert s3.files(f"{bucket}/c") == whole
    assert arrived
    assert all(puts[name] == before[name] for name in arrived)
    assert sum(path.stat().st_size for path in (tmp_path / "run" / "cache").glob("*-0*.h5")) <= bound

    outcome = tristill(s3, "dump-logits", *options, *at_url)
    assert "up to date" in outcome.stderr
    outcome = tristill(s3, "dump-logits", "--force", *options, *at_url)
    assert outcome.code == 1
    assert "--force deletes nothing at a URL" in outcome.stderr

    elsewhere = (*CONFIG, "--run-dir", str(tmp_path / "elsewhere"))
    outcome = tristill(s3, "distill", *elsewhere, *at_url)
    assert outcome.code == 0, outcome.stderr
    student, expected = tmp_path / "elsewhere" / "students" / "student", finished_run / "students" / "student"
    assert (student / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    summaries = [json.loads((folder / "summary.json").read_bytes()) for folder in (student, expected)]
    for name in ("cache", "student"):
        assert summaries[0]["fingerprints"][name] == summaries[1]["fingerprints"][name]
    assert summaries[0]["validation"] == summaries[1]["validation"]


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_student_killed_while_it_fetches_goes_on_to_the_same_weights(
    finished_run: Path, s3: S3, dumped: str, tmp_path: Path, kills: int
) -> None:
    bound = bound_of(finished_run / "cache")
    options = (
        *CONFIG,
        "--run-dir",
        str(tmp_path),
        "--set",
        f"cache.url={dumped}",
        "--set",
        f"cache.local_bytes={bound}",
    )
    generator = random.Random(5)
    for _ in range(kills):
        num_served = generator.randrange(1, 12)
        with s3.faults(lambda method, path: None) as counts:
            process = started(s3, "distill", *options)
            while counts["served"] < num_served and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
    outcome = tristill(s3, "distill", *options)
    assert outcome.code == 0, outcome.stderr
    name = "students/student/model.safetensors"
    assert (tmp_path / name).read_bytes() == (finished_run / name).read_bytes()
    assert not list((tmp_path / "cache").glob(".*.partial"))


def test_cache_commands_take_a_url(copied_run: Path, s3: S3, bucket: str, dumped: str) -> None:
    local = copied_run / "cache"
    found = json.loads(tristill(s3, "cache", "info", "--json", dumped).stdout)
    expected = {**cache_info(local), **cache_details(local), "folder": dumped, "provenance": None}
    assert found == json.loads(json.dumps(expected))
    texts = peek_text(local, "validation", range(1), range(8), 5, is_coloured=False)
    assert tristill(s3, "cache", "peek", "--no-color", dumped).stdout == "".join(f"{text}\n" for text in texts)
    outcome = tristill(s3, "cache", "verify", dumped)
    assert (outcome.code, outcome.stdout) == (0, f"{dumped}: every byte is as it was written\n")

    good = s3.request("GET", f"/{bucket}/c/train-00001.h5")
    s3.put(f"{bucket}/c/train-00001.h5", good[:5000] + bytes([good[5000] ^ 4]) + good[5001:])
    outcome = tristill(s3, "cache", "verify", dumped)
    assert outcome.code == 1
    assert outcome.stdout.startswith(f"{dumped}/train-00001.h5: fetched 3 times, and its SHA-256 was not")
    outcome = tristill(s3, "cache", "repair", dumped)
    assert "a cache at a URL is repaired by deleting there what" in outcome.stderr
    s3.request("DELETE", f"/{bucket}/c/train-00001.h5")
    options = (
        *CONFIG,
        "--run-dir",
        str(copied_run),
        "--set",
        f"cache.url={dumped}",
        "--set",
        f"cache.dir={copied_run / 'other'}",
    )
    outcome = tristill(s3, "dump-logits", *options)
    assert outcome.code == 0, outcome.stderr
    assert s3.request("GET", f"/{bucket}/c/train-00001.h5") == good


def test_a_url_that_cannot_be_reached_is_said_and_is_not_taken_for_no_cache(s3: S3, tmp_path: Path) -> None:
    options = (*CONFIG, "--run-dir", str(tmp_path), "--set", "cache.url=s3://bucket/c")
    with s3.faults(lambda method, path: "403"):
        outcome = tristill(s3, "distill", *options)
    assert outcome.code == 1
    assert "s3://bucket/c/cache.json: could not be looked at, tried 1 times in" in outcome.stderr
    assert not (tmp_path / "students" / "student" / "model.safetensors").exists()
    outcome = tristill(s3, "distill", *CONFIG, "--run-dir", str(tmp_path), "--set", "cache.url=s3://a:b@bucket/c")
    assert outcome.code == 2
    assert "cache.url: a URL with a user, password or signature" in outcome.stderr


@pytest.mark.parametrize("kind", ["text", "records"])
def test_a_corpus_at_a_url_gives_the_tokens_of_the_same_files_here(
    s3: S3, bucket: str, tmp_path: Path, kind: str
) -> None:
    suffix = {"text": ".txt", "records": ".jsonl"}[kind]
    generator = random.Random(1)
    words = ["one", "two", "three", "four\n", "five", "\n\n"]
    for number in range(12):
        documents = [" ".join(generator.choices(words, k=400)) for _ in range(4)]
        text = (
            "\n".join(json.dumps({"text": document}) for document in documents)
            if kind == "records"
            else "".join(documents)
        )
        for name in (f"part {number}{suffix}", f"deep/part-{number}{suffix}"):
            path = tmp_path / "corpus" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + name) if kind == "text" else path.write_text(text)
            s3.put(f"{bucket}/corpus/{name.replace(' ', '%20')}", path.read_bytes())
    faulty = iter([fault for kind in ("500", "cut", "reset", "503") for fault in (*[None] * 5, kind)] * 100)
    base = load_config(Path(CONFIG[1])).data

    def source_at(place: str) -> dict[str, object]:
        return {"kind": kind, "paths": [f"{place}/deep/*-1*{suffix}", f"{place}/part*{suffix}"]}

    def tokenized(place: str, run: Path) -> dict[str, bytes]:
        changes = {"source": source_at(place), "validation_fraction": 0.4}
        config = DataConfig.model_validate({**base.model_dump(), **changes})
        tokenize_corpus(config, run / "data")
        return {path.name: path.read_bytes() for path in (run / "data").iterdir() if path.name != "provenance.json"}

    here, there = tokenized(str(tmp_path / "corpus"), tmp_path / "here"), f"s3://{bucket}/corpus"
    assert len(here) == 4
    if kind == "records":
        with s3.faults(lambda method, path: next(faulty)) as counts:  # type: ignore[arg-type]
            assert tokenized(there, tmp_path / "there") == here
        assert counts["cut"]
        return
    run = (*CONFIG, "--run-dir", str(tmp_path / "there"), "--set", "data.validation_fraction=0.4")
    own = ("--set", f"data.source={{kind='text', paths={json.dumps(source_at(there)['paths'])}}}")
    with s3.faults(lambda method, path: next(faulty)):  # type: ignore[arg-type]
        outcome = tristill(s3, "tokenize", *run, *own)
    assert outcome.code == 0, outcome.stderr
    assert "again in" in outcome.stderr
    assert {name: (tmp_path / "there" / "data" / name).read_bytes() for name in here} == here
    assert "up to date" in tristill(s3, "tokenize", *run, *own).stderr
    s3.put(f"{bucket}/corpus/deep/part-10{suffix}", b"other")
    outcome = tristill(s3, "tokenize", *run, *own)
    assert outcome.code == 1
    assert "input corpus: was" in outcome.stderr


def test_a_corpus_that_is_not_at_its_url_is_said(s3: S3, bucket: str, tmp_path: Path) -> None:
    source = TextFiles(kind="text", paths=(f"s3://{bucket}/none/*",))
    with pytest.raises(CorpusError, match=rf"s3://{bucket}/none/\*: found no file there; data.source.paths takes"):
        corpus_files(source)
    with pytest.raises(ValidationError, match="a URL with a user, password or signature"):
        TextFiles(kind="text", paths=("s3://a:b@bucket/x.txt",))
