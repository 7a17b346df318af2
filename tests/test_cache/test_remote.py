"""Caches at URLs: in memory for what is decided, on a real S3 server behind a breaking proxy for what goes wrong."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest
from s3_server import S3, Fault, Plan

from conftest import ENVIRONMENT, ROOT, TOKENIZER_JSON, make_spec, write_cache, write_shards
from tristill.cache import (
    Cache,
    CacheCorruptError,
    CacheMismatchError,
    CacheMissingError,
    CacheRequestError,
    CacheStoreError,
    CacheWriter,
    WindowBatch,
    open_cache,
    verify_cache,
)
from tristill.cache.locks import lock
from tristill.cache.remote import keep_copy, remote_copy
from tristill.cache.room import ROOM_LOCK
from tristill.cache.store import Patience, Store, check_url

QUICK = Patience(first_pause_s=0.01, timeout_s=2.0)
SPEC = make_spec()
SHARDS = 6
_ALL_FAULTS: tuple[Fault, ...] = ("500", "503", "cut", "flip", "reset", "hang")


@pytest.fixture
def local(tmp_path: Path) -> Cache:
    """What every remote cache of these tests must be like."""
    return write_cache(tmp_path / "local", SPEC)


@pytest.fixture
def memory_url(local: Cache) -> Iterator[str]:
    """The same cache in memory."""
    url = f"memory://tests/{time.monotonic_ns()}"
    upload(local.folder, url)
    yield url
    fsspec.filesystem("memory").rm(url.removeprefix("memory:/"), recursive=True)


def upload(folder: Path, url: str) -> None:
    system, root = fsspec.core.url_to_fs(url)
    for path in folder.iterdir():
        system.pipe_file(f"{root}/{path.name}", path.read_bytes())


def put_all(s3: S3, folder: Path, bucket: str) -> None:
    for path in folder.iterdir():
        s3.put(f"{bucket}/c/{path.name}", path.read_bytes())


def copy_of(
    url: str, folder: Path, local_bytes: int | None = None, patience: Patience = QUICK, told: list[str] | None = None
) -> Cache:
    keep_copy(folder, None, None, print)
    keep_copy(folder, url, local_bytes, (told if told is not None else []).append, patience)
    return open_cache(folder)


def shard_sizes(cache: Cache) -> dict[str, int]:
    return {record.name: record.file_bytes for record in cache.manifest.shards}


def same(found: WindowBatch, expected: WindowBatch) -> bool:
    pairs = [(found.input_ids, expected.input_ids)]
    pairs += [(found.target[name], values) for name, values in expected.target.items()]
    pairs += [(found.hidden[layer], values) for layer, values in expected.hidden.items()]
    return all(np.array_equal(left, right) for left, right in pairs)


def assert_streams_alike(found: Cache, expected: Cache, seed: int = 3) -> None:
    options = {"seed": seed, "drop_last": False, "hidden_layers": (1, 3)}
    batches = zip(found.stream("train", 8, **options), expected.stream("train", 8, **options), strict=True)  # type: ignore[arg-type]
    for left, right in batches:
        assert same(left, right)


def held_bytes(folder: Path) -> int:
    """At one moment: a shard that gets its name while this looks counts once, and none goes or comes."""
    sizes: dict[str, int] = {}
    if not folder.is_dir():
        return 0
    with lock(folder, ROOM_LOCK):
        for path in folder.iterdir():
            if ".h5" in path.name:
                with suppress(FileNotFoundError):
                    sizes[path.name.removeprefix(".").removesuffix(".partial")] = path.stat().st_size
    return sum(sizes.values())


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The bytes of shards in a folder, whole and in the making, looked at all the time."""
    seen: list[int] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            seen.append(held_bytes(folder))
            time.sleep(0.0005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


def seeded_faults(seed: int, share: float) -> tuple[Plan, Counter[str]]:
    """Faults of all kinds in turn, for a share of requests, but never so many in a row that attempts run out."""
    generator, made, in_a_row = random.Random(seed), Counter[str](), 0
    kinds: list[Fault] = []
    guard = threading.Lock()

    def plan(method: str, path: str) -> Fault | None:
        nonlocal in_a_row
        with guard:
            in_a_row = in_a_row + 1 if generator.random() < share and in_a_row < 4 else 0
            if not in_a_row:
                return None
            if not kinds:
                kinds.extend(_ALL_FAULTS if not made else _ALL_FAULTS[:-1])  # one that hangs takes long
                generator.shuffle(kinds)
            made[kinds[-1]] += 1
            return kinds.pop()

    return plan, made


def test_a_copy_reads_as_the_cache_itself_and_fetches_only_what_is_read(
    local: Cache, memory_url: str, tmp_path: Path
) -> None:
    copy = copy_of(memory_url, tmp_path / "copy")
    assert copy.manifest == local.manifest
    assert not list((tmp_path / "copy").glob("*.h5"))
    assert same(copy.window("train", 20), local.window("train", 20))
    assert [path.name for path in (tmp_path / "copy").glob("*.h5")] == ["train-00001.h5"]
    assert_streams_alike(copy, local)
    assert {path.name for path in (tmp_path / "copy").glob("train-*.h5")} == set(shard_sizes(local)) - {
        "validation-00000.h5"
    }


def test_shards_told_ahead_are_there_before_they_are_asked_for(memory_url: str, tmp_path: Path) -> None:
    copy = copy_of(memory_url, tmp_path / "copy")
    copy._files.ahead(["train-00002.h5", "train-00000.h5"])
    deadline = time.monotonic() + 10
    while len(list((tmp_path / "copy").glob("train-*.h5"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fsspec.filesystem("memory").rm(memory_url.removeprefix("memory:/") + "/train-00002.h5")
    assert len(copy.window("train", 33).input_ids) == 1


@pytest.mark.parametrize("shards_held", [2, 3])
def test_a_copy_never_holds_more_than_its_bound(
    local: Cache, memory_url: str, tmp_path: Path, shards_held: int
) -> None:
    bound = shards_held * max(shard_sizes(local).values()) + 10
    told: list[str] = []
    copy = copy_of(memory_url, tmp_path / "copy", bound, told=told)
    with watched(tmp_path / "copy") as seen:
        for seed in range(3):
            assert_streams_alike(copy, local, seed)
        for window in random.Random(1).choices(range(70), k=60):
            assert same(copy.window("train", window), local.window("train", window))
    assert 0 < max(seen) <= bound
    assert len(copy._open) <= shards_held
    assert "fetched several times an epoch" in told[0]


def test_a_bound_without_room_for_two_shards_is_refused_with_what_it_takes(
    local: Cache, memory_url: str, tmp_path: Path
) -> None:
    least = 2 * max(shard_sizes(local).values())
    with pytest.raises(CacheRequestError, match=f"cache.local_bytes: found 100, expected at least {least:,}, which"):
        copy_of(memory_url, tmp_path / "copy", 100)


def test_a_local_shard_is_not_believed_but_checked_and_fetched_again(
    local: Cache, memory_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    copy_of(memory_url, folder).window("train", 0)
    path = folder / "train-00000.h5"
    good = path.read_bytes()
    for bad in (good[:-1], good[:1000] + bytes([good[1000] ^ 1]) + good[1001:], b""):
        path.write_bytes(bad)
        assert same(copy_of(memory_url, folder).window("train", 0), local.window("train", 0))
        assert path.read_bytes() == good
    path.unlink()
    path.symlink_to(local.folder / "train-00001.h5")
    assert same(copy_of(memory_url, folder).window("train", 0), local.window("train", 0))
    assert not path.is_symlink()
    assert (local.folder / "train-00001.h5").is_file()


def test_a_shard_that_is_damaged_at_the_url_is_named_after_three_fetches(memory_url: str, tmp_path: Path) -> None:
    system, root = fsspec.core.url_to_fs(memory_url)
    good = system.cat_file(f"{root}/train-00002.h5")
    system.pipe_file(f"{root}/train-00002.h5", good[:999] + bytes([good[999] ^ 16]) + good[1000:])
    told: list[str] = []
    copy = copy_of(memory_url, tmp_path / "copy", told=told)
    with pytest.raises(CacheCorruptError, match=f"{memory_url}/train-00002.h5: fetched 3 times, and its SHA-256 was"):
        copy.window("train", 40)
    assert len(told) == 2
    assert not list((tmp_path / "copy").glob("*train-00002*"))
    (problem,) = verify_cache(tmp_path / "copy", lambda _: None)
    assert "the file is damaged there: delete it and run `tristill dump-logits`" in problem
    system.rm(f"{root}/train-00002.h5")
    with pytest.raises(CacheCorruptError, match=r"train-00002.h5: is missing there; run `tristill dump-logits`"):
        copy.window("train", 40)
    assert remote_copy(tmp_path / "copy").lost_shards(copy.manifest) == ["train-00002.h5"]  # type: ignore[union-attr]


def test_a_newer_cache_at_the_url_takes_the_place_of_the_copy_but_never_of_a_cache_that_is_none(
    local: Cache, memory_url: str, tmp_path: Path
) -> None:
    copy_of(memory_url, tmp_path / "copy").window("train", 0)
    other = write_cache(tmp_path / "other", make_spec(splits=SPEC.splits, vocab_size=299))
    upload(other.folder, memory_url)
    assert_streams_alike(copy_of(memory_url, tmp_path / "copy"), other)
    with pytest.raises(CacheMismatchError, match=r"holds another cache than memory://.*, and is no copy of it; set"):
        copy_of(memory_url, local.folder)
    assert load_manifest_of(local.folder) == local.manifest.to_json().encode()
    assert_streams_alike(copy_of(memory_url, other.folder), other)  # the same cache may become a copy


def load_manifest_of(folder: Path) -> bytes:
    return (folder / "cache.json").read_bytes()


def test_a_cache_of_which_the_url_holds_a_part_is_not_made_its_copy(
    local: Cache, memory_url: str, tmp_path: Path
) -> None:
    shutil.copytree(local.folder, tmp_path / "own")
    copy_of(memory_url, tmp_path / "own")  # all is there: nothing can be lost
    (tmp_path / "own" / "copy.json").unlink()
    fsspec.filesystem("memory").rm(memory_url.removeprefix("memory:/") + "/train-00002.h5")
    with pytest.raises(CacheMismatchError, match="holds the cache, more whole than memory://"):
        copy_of(memory_url, tmp_path / "own")
    assert not (tmp_path / "own" / "copy.json").exists()
    other = write_cache(tmp_path / "other", make_spec(train=30))
    keep_copy(other.folder, memory_url, None, print, QUICK)
    with pytest.raises(CacheMismatchError):
        CacheWriter(other.folder, other.spec, TOKENIZER_JSON)
    assert not (tmp_path / "other" / "copy.json").exists()


def test_what_is_no_cache_at_a_url_is_said(tmp_path: Path) -> None:
    with pytest.raises(CacheMissingError, match="memory://nothing/here: found no cache; run `tristill dump-logits`"):
        copy_of("memory://nothing/here", tmp_path / "copy")
    system = fsspec.filesystem("memory")
    system.pipe_file("/odd/cache.json", b"{}")
    with pytest.raises(CacheCorruptError, match=r"memory://odd/cache.json: the manifest breaks the cache format"):
        copy_of("memory://odd", tmp_path / "copy")
    with pytest.raises(CacheRequestError, match="fsspec knows no such place"):
        copy_of("nosuch://odd", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_file_larger_than_declared_is_not_read() -> None:
    fsspec.filesystem("memory").pipe_file("/large/file", bytes(1001))
    store = Store("memory://large", print, QUICK)
    assert store.read("file", 1001) == bytes(1001)
    with pytest.raises(CacheCorruptError, match="memory://large/file: found 1001 bytes, expected at most 1000"):
        store.read("file", 1000)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://key:secret@bucket/cache", "give credentials in the environment"),
        ("https://host/cache?X-Amz-Signature=abc", "give credentials in the environment"),
        ("runs/demo/cache", "expected one URL"),
        ("simplecache::s3://bucket/cache", "expected one URL"),
    ],
)
def test_urls_with_secrets_or_of_several_parts_are_refused(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_url(url)


def test_pauses_double_up_to_their_bound_and_differ_by_seed() -> None:
    patience = Patience(first_pause_s=1, longest_pause_s=8)
    pauses = [[patience.pause_s(n, random.Random(seed)) for n in range(1, 7)] for seed in (1, 1, 2)]
    assert pauses[0] == pauses[1] != pauses[2]
    for pause, longest in zip(pauses[0], [1, 2, 4, 8, 8, 8], strict=True):
        assert longest / 2 <= pause <= longest


def write_to(url: str, folder: Path, local_bytes: int | None = None, at_most: int | None = None) -> CacheWriter:
    keep_copy(folder, None, None, print)
    keep_copy(folder, url, local_bytes, lambda _: None, QUICK)
    writer = CacheWriter(folder, SPEC, TOKENIZER_JSON)
    write_shards(writer, at_most=at_most)
    return writer


def wait_until(check: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not check():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_dump_and_a_reader_get_through_every_kind_of_failure(
    local: Cache, s3: S3, bucket: str, tmp_path: Path
) -> None:
    url, bound = f"s3://{bucket}/c", 3 * max(shard_sizes(local).values())
    plan, made = seeded_faults(seed=7, share=0.4)
    with s3.faults(plan), watched(tmp_path / "dump") as seen:
        manifest = write_to(url, tmp_path / "dump", bound).finish()
    assert manifest == local.manifest
    assert max(seen) <= bound
    assert made.keys() == set(_ALL_FAULTS)
    expected = {path.name: path.read_bytes() for path in local.folder.iterdir() if path.is_file()}
    assert s3.files(f"{bucket}/c") == expected
    plan, made = seeded_faults(seed=8, share=0.4)
    with s3.faults(plan), watched(tmp_path / "copy") as seen:
        copy = copy_of(url, tmp_path / "copy", bound)
        assert_streams_alike(copy, local)
        assert_streams_alike(copy, local, seed=4)
    assert max(seen) <= bound
    assert made.keys() == set(_ALL_FAULTS)


@pytest.mark.parametrize(("fault", "named"), [("500", "made by the test"), ("hang", "Timeout")])
def test_attempts_and_time_are_bounded_and_the_error_says_what_was_tried(
    local: Cache, s3: S3, bucket: str, tmp_path: Path, fault: Fault, named: str
) -> None:
    put_all(s3, local.folder, bucket)
    told: list[str] = []
    copy = copy_of(f"s3://{bucket}/c", tmp_path / "copy", told=told)
    told.clear()
    remote_copy(tmp_path / "copy").store.patience = Patience(attempts=3, first_pause_s=0.01, timeout_s=0.3)  # type: ignore[union-attr]
    started = time.monotonic()
    with (
        s3.faults(lambda method, path: fault) as counts,
        pytest.raises(CacheStoreError, match=rf"s3://{bucket}/c/train-00001.h5: could not be read, tried 3 times in"),
    ):
        copy.window("train", 20)
    assert time.monotonic() - started < 3 * (0.3 + 1.5)
    assert counts[fault] == 3
    assert len(told) == 2
    assert all(named in line for line in told)


def test_what_cannot_succeed_is_tried_once(s3: S3, bucket: str, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(CacheMissingError):
        copy_of("s3://no-such-bucket-anywhere/c", tmp_path / "copy", told=told)
    assert told == []


def test_a_dump_that_failed_goes_on_with_what_has_arrived_even_on_another_machine(
    local: Cache, s3: S3, bucket: str, tmp_path: Path
) -> None:
    url = f"s3://{bucket}/c"
    writer = write_to(url, tmp_path / "one", at_most=3)
    wait_until(lambda: len(s3.names(f"{bucket}/c/records")) == 3)
    with pytest.raises(CacheMissingError, match="found an unfinished cache of 3 shards"):
        open_cache(writer.folder)
    with s3.faults(lambda method, path: None):
        put: list[str] = []

        def noted(method: str, path: str) -> None:
            if method == "PUT" and path.split("?", maxsplit=1)[0].endswith(".h5"):
                put.append(path.rsplit("/", maxsplit=1)[-1].split("?", maxsplit=1)[0])

        with s3.faults(noted):  # type: ignore[arg-type]
            second = write_to(url, tmp_path / "two")
            assert second.finish() == local.manifest
    assert sorted(put) == sorted(shard_sizes(local))[3:]
    assert len(list((tmp_path / "two").glob("*.h5"))) == SHARDS - 3
    assert_streams_alike(copy_of(url, tmp_path / "two"), local)
    keep_copy(tmp_path / "three", url, None, print, QUICK)
    with pytest.raises(CacheMismatchError, match="holds another cache, or a part of one: vocab_size: found 300, expe"):
        CacheWriter(tmp_path / "three", make_spec(vocab_size=299), TOKENIZER_JSON)


RANK = """
import sys
from pathlib import Path
from tristill.cache.remote import keep_copy
from tristill.cache.writer import CacheWriter
from conftest import make_spec, window_arrays

rank, folder, url, local_bytes = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
keep_copy(folder, url, local_bytes, print)
writer = CacheWriter(folder, make_spec(), None, None, found=[])
print("ready", flush=True)
input()
for shard in writer.missing_shards()[rank::2]:
    shard_writer = writer.shard(shard)
    shard_writer.append(window_arrays(writer.spec, shard.split, range(shard.first_window, shard.first_window + shard.num_windows)))
    shard_writer.commit()
writer.settle()
"""


@pytest.mark.parametrize("attempt", range(3))
def test_two_ranks_of_a_dump_share_a_bounded_copy(local: Cache, tmp_path: Path, attempt: int) -> None:
    largest = max(shard_sizes(local).values())
    folder, url = tmp_path / "copy", f"file://{tmp_path}/url"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(TOKENIZER_JSON)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder), url, str(3 * largest)],
            cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in ranks:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=60) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], ends
    assert {path.name for path in (tmp_path / "url").glob("*.h5")} == set(shard_sizes(local))
    for name in shard_sizes(local):
        assert (tmp_path / "url" / name).read_bytes() == (local.folder / name).read_bytes()


def test_shards_with_a_record_of_another_spec_or_other_bytes_are_not_taken(s3: S3, bucket: str, tmp_path: Path) -> None:
    url = f"s3://{bucket}/c"
    write_to(url, tmp_path / "one", at_most=3)
    wait_until(lambda: len(s3.names(f"{bucket}/c/records")) == 3)
    s3.put(f"{bucket}/c/train-00000.h5", b"x" * 10)
    s3.put(f"{bucket}/c/records/train-00001.h5.json", b"not a record")
    keep_copy(tmp_path / "two", url, None, print, QUICK)
    missing = CacheWriter(tmp_path / "two", SPEC, TOKENIZER_JSON).missing_shards()
    assert [shard.name for shard in missing][:3] == ["train-00000.h5", "train-00001.h5", "train-00003.h5"]
    keep_copy(tmp_path / "three", url, None, print, QUICK)
    with pytest.raises(CacheMismatchError, match=r"a part of one: train-0000..h5 is recorded with another spec"):
        CacheWriter(tmp_path / "three", make_spec(vocab_size=299), TOKENIZER_JSON)


def test_an_upload_that_is_refused_stops_the_dump(s3: S3, bucket: str, tmp_path: Path) -> None:
    keep_copy(tmp_path / "one", f"s3://{bucket}/c", None, lambda _: None, Patience(attempts=2, first_pause_s=0.01))
    writer = CacheWriter(tmp_path / "one", SPEC, TOKENIZER_JSON)

    def write() -> None:
        write_shards(writer)
        writer.finish()

    refused = pytest.raises(CacheStoreError, match=r"train-0000.\.h5: could not be written, tried 2 times")
    with s3.faults(lambda method, path: "500" if method == "PUT" else None), refused:
        write()
    assert "cache.json" not in s3.files(f"{bucket}/c")


_READ = """
import hashlib, sys
from pathlib import Path
from tristill.cache import open_cache
from tristill.cache.remote import keep_copy
from tristill.cache.room import ROOM_LOCK
from tristill.cache.store import Patience
folder, url, bound, seed = sys.argv[1:]
keep_copy(Path(folder), url, int(bound) or None, lambda text: print(text, file=sys.stderr), Patience(first_pause_s=0.01))
digest = hashlib.sha256()
print("ready", flush=True)
for epoch in range(2):
    for batch in open_cache(folder).stream("train", 8, seed=int(seed), epoch=epoch, hidden_layers=(1, 3)):
        digest.update(batch.input_ids.tobytes() + batch.hidden[3].tobytes())
print(digest.hexdigest())
"""


def reader(s3: S3, folder: Path, url: str, bound: int, seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _READ, str(folder), url, str(bound), str(seed)]
    environment = {**ENVIRONMENT, **s3.environment}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def digest_of(cache: Cache, seed: int) -> str:
    digest = hashlib.sha256()
    for epoch in range(2):
        for batch in cache.stream("train", 8, seed=seed, epoch=epoch, hidden_layers=(1, 3)):
            digest.update(batch.input_ids.tobytes() + batch.hidden[3].tobytes())
    return digest.hexdigest()


def test_two_processes_share_a_folder_and_fetch_each_shard_once(
    local: Cache, s3: S3, bucket: str, tmp_path: Path
) -> None:
    put_all(s3, local.folder, bucket)
    got: Counter[str] = Counter()

    def noted(method: str, path: str) -> None:
        if method == "GET" and path.endswith(".h5"):
            got[path.rsplit("/", maxsplit=1)[-1]] += 1

    with s3.faults(noted):  # type: ignore[arg-type]
        processes = [reader(s3, tmp_path / "copy", f"s3://{bucket}/c", 0, seed) for seed in (1, 2)]
        found = [process.communicate(timeout=60)[0].split() for process in processes]
    assert found == [["ready", digest_of(local, seed)] for seed in (1, 2)]
    assert got == dict.fromkeys((name for name in shard_sizes(local) if name.startswith("train")), 1)


def test_two_processes_share_a_folder_with_less_room_than_they_read(
    local: Cache, s3: S3, bucket: str, tmp_path: Path
) -> None:
    put_all(s3, local.folder, bucket)
    bound = 3 * max(shard_sizes(local).values())
    with watched(tmp_path / "copy") as seen:
        processes = [reader(s3, tmp_path / "copy", f"s3://{bucket}/c", bound, seed) for seed in (1, 2)]
        found = [process.communicate(timeout=60)[0].split() for process in processes]
    assert found == [["ready", digest_of(local, seed)] for seed in (1, 2)]
    assert max(seen) <= bound


def test_a_reader_killed_in_mid_fetch_leaves_nothing_that_counts(
    local: Cache, s3: S3, bucket: str, tmp_path: Path
) -> None:
    put_all(s3, local.folder, bucket)
    folder, bound = tmp_path / "copy", 3 * max(shard_sizes(local).values())
    with s3.faults(lambda method, path: "hang" if method == "GET" and path.endswith(".h5") else None):
        process = reader(s3, folder, f"s3://{bucket}/c", bound, 1)
        wait_until(lambda: list(folder.glob(".*.partial")) if folder.is_dir() else False)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert list(folder.glob(".*.partial"))
    assert not list(folder.glob("*.h5"))
    with watched(folder) as seen:
        assert_streams_alike(copy_of(f"s3://{bucket}/c", folder, bound), local)
    assert max(seen) <= bound
    wait_until(lambda: not list(folder.glob(".*.partial")))  # what was fetched ahead may be under way
