"""Damage is found, named, and never read as data."""

import contextlib
import json
import os
import random
import resource
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from conftest import TOKENIZER_JSON, make_spec, window_arrays, write_cache, write_shards
from tristill.cache import (
    Cache,
    CacheCorruptError,
    CacheError,
    CacheMismatchError,
    CacheMissingError,
    CacheWriter,
    PlainTopKProfile,
    open_cache,
    verify_cache,
)
from tristill.cache.hashing import sha256_of_file


def silent(num_bytes: int) -> None:
    """Progress is of no interest here."""


def read_all(folder: Path) -> list[bytes]:
    cache = open_cache(folder)
    try:
        return [
            array.tobytes()
            for split in ("train", "validation")
            for batch in cache.stream(split, 5, seed=None, drop_last=False, hidden_layers=(1, 3))
            for array in (batch.input_ids, *batch.target.values(), *batch.hidden.values())
        ]
    finally:
        cache.close()


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_an_intact_cache_verifies(small_cache: Cache) -> None:
    assert verify_cache(small_cache.folder, silent) == []


def test_verify_finds_a_flip_anywhere_and_the_reader_never_returns_wrong_data(tmp_path: Path) -> None:
    spec = make_spec(9, 2)
    write_cache(tmp_path, spec).close()
    shard = tmp_path / "train-00000.h5"
    good, truth = shard.read_bytes(), read_all(tmp_path)
    generator = random.Random(0)
    for position in generator.sample(range(len(good)), 150):
        shard.write_bytes(good)
        flip(shard, position, generator.randrange(8))
        (problem,) = verify_cache(tmp_path, silent)
        assert "train-00000.h5" in problem
        try:
            assert read_all(tmp_path) == truth, f"wrong data after a flip at {position}"
        except CacheError as exc:
            assert "train-00000.h5" in str(exc)


@pytest.mark.parametrize("kept", [0, 1, 100, 2000, -1])
def test_reader_refuses_a_truncated_shard(small_cache: Cache, kept: int) -> None:
    shard = small_cache.folder / "train-00001.h5"
    content = shard.read_bytes()
    shard.write_bytes(content[:kept])
    with pytest.raises(CacheCorruptError, match=rf"train-00001.h5: found {len(content[:kept])} bytes, expected"):
        open_cache(small_cache.folder)


def test_reader_names_the_chunk_with_a_flipped_byte_and_the_way_out(small_cache: Cache) -> None:
    shard = small_cache.folder / "train-00001.h5"
    with h5py.File(shard) as file:
        flip(shard, file["head_ids"].id.get_chunk_info(2).byte_offset + 9)
    with pytest.raises(
        CacheCorruptError,
        match=r"train-00001.h5: dataset head_ids, chunk 2: its stored bytes are damaged .* delete this",
    ):
        list(small_cache.stream("train", 5, seed=0))


def test_missing_and_unfinished_caches_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(CacheMissingError, match="found no cache; run `tristill dump-logits`"):
        open_cache(tmp_path / "nowhere")
    write_shards(CacheWriter(tmp_path, make_spec(), TOKENIZER_JSON), at_most=2)
    with pytest.raises(CacheMissingError, match="found an unfinished cache of 2 shards"):
        open_cache(tmp_path)


def change_manifest(folder: Path, old: str, new: str) -> None:
    path = folder / "cache.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("name", ["../train-00000.h5", "/etc/passwd", "train-00000.h5/../x", "Train-00000.h5", ""])
def test_a_manifest_cannot_name_a_file_outside_its_folder(small_cache: Cache, name: str) -> None:
    change_manifest(small_cache.folder, '"name":"train-00000.h5"', f'"name":{json.dumps(name)}')
    with pytest.raises(CacheCorruptError, match=r"shards\.0\.name: String should match pattern"):
        open_cache(small_cache.folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format_version":2', '"format_version":4', "format_version: Input should be 1, 2 or 3; found 4"),
        ('"vocab_size":300', '"vocab_size":"many"', "vocab_size: Input should be a valid integer"),
        ('"first_window":16', '"first_window":17', "the list of shards does not follow from the spec"),
        ('"spec":{', '"extra":1,"spec":{', "extra: Extra inputs are not permitted"),
        ("{", "", "Invalid JSON"),
    ],
)
def test_a_broken_manifest_is_refused_with_the_field(small_cache: Cache, old: str, new: str, message: str) -> None:
    change_manifest(small_cache.folder, old, new)
    with pytest.raises(CacheCorruptError, match=message):
        open_cache(small_cache.folder)


def test_declared_sizes_are_checked_before_anything_is_allocated(small_cache: Cache) -> None:
    text = (small_cache.folder / "cache.json").read_text()
    for claimed, error, message in (
        ("999999999", CacheCorruptError, "a chunk of 4 windows takes 63999999936 bytes, expected at most 268435456"),
        ("99999", CacheMismatchError, "context_length: found 6, expected 99999"),
    ):
        changed = text.replace('"context_length":6', f'"context_length":{claimed}')
        (small_cache.folder / "cache.json").write_text(changed)
        with pytest.raises(error, match=message):
            open_cache(small_cache.folder).window("train", 0)


def test_a_manifest_that_claims_endless_shards_is_refused_at_once(small_cache: Cache) -> None:
    change_manifest(small_cache.folder, '"num_windows":70}', '"num_windows":1000000000000}')
    with pytest.raises(CacheCorruptError, match="found 6 shards, expected the 62500000001 that the spec declares"):
        open_cache(small_cache.folder)


def test_a_pipe_in_place_of_a_shard_does_not_hang(small_cache: Cache) -> None:
    shard = small_cache.folder / "train-00000.h5"
    shard.unlink()
    os.mkfifo(shard)
    (problem,) = small_cache.verify()
    assert "train-00000.h5: is not a regular file" in problem


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    spec = make_spec(9, 2)
    writer = CacheWriter(tmp_path, spec, TOKENIZER_JSON)
    for shard in writer.missing_shards():
        rows = window_arrays(spec, shard.split, range(shard.num_windows))
        rows["head_ids"][0, 0, 0] = 300
        shard_writer = writer.shard(shard)
        shard_writer.append(rows)
        shard_writer.commit()
    writer.finish()
    with pytest.raises(CacheCorruptError, match="dataset head_ids, chunk 0: holds id 300, expected ids below 300"):
        open_cache(tmp_path).window("train", 0)


def test_trouble_of_the_system_is_not_taken_for_damage(small_cache: Cache) -> None:
    descriptors, limit = [], resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limit[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                descriptors.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files"):
            CacheWriter(small_cache.folder, small_cache.spec, TOKENIZER_JSON)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert small_cache.verify() == []


def rewrite(path: Path, change: object) -> None:
    """Edit a shard with h5py and make size and checksum of the manifest agree, as an attacker would."""
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        change(file)  # type: ignore[operator]
    manifest = path.parent / "cache.json"
    content = json.loads(manifest.read_text())
    for record in content["shards"]:
        if record["name"] == path.name:
            record.update(file_bytes=path.stat().st_size, sha256=sha256_of_file(path))
    manifest.write_text(json.dumps(content))


def replace_dataset(file: h5py.File, name: str, **settings: object) -> None:
    del file[name]
    file.create_dataset(name, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.__delitem__("head_ids"), "head_ids: is missing or is a link"),
        (
            lambda f: (f.__delitem__("head_ids"), f.__setitem__("head_ids", h5py.ExternalLink("/etc/passwd", "x"))),
            "head_ids: is missing or is a link",
        ),
        (lambda f: (f.__delitem__("head_ids"), f.create_group("head_ids")), "head_ids: is no dataset"),
        (
            lambda f: replace_dataset(
                f, "head_ids", shape=(16, 6, 5), dtype="<u2", chunks=(4, 6, 5), compression="gzip"
            ),
            r"has filters \[1\], expected \[32015\]",
        ),
        (
            lambda f: replace_dataset(f, "head_ids", shape=(10**9, 6, 5), dtype="<u2", chunks=(4, 6, 5)),
            r"has type, shape and chunks .*1000000000",
        ),
        (
            lambda f: replace_dataset(f, "head_ids", shape=(16, 6, 5), dtype=h5py.string_dtype(), chunks=(4, 6, 5)),
            "has type, shape and chunks",
        ),
        (
            lambda f: replace_dataset(
                f, "input_ids", shape=(16, 7), dtype="<u2", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
            ),
            "input_ids: has its bytes in other files",
        ),
        (lambda f: f.attrs.__setitem__("tristill_spec", "variable length"), "is not a fixed-length string"),
        (
            lambda f: f.attrs.__setitem__("tristill_spec", np.bytes_(b"[1]")),
            "is not a JSON object with a format version",
        ),
        (
            lambda f: f.attrs.__setitem__("tristill_spec", np.bytes_(b'{"format_version": 9}')),
            "found cache format version 9, this program reads versions 1 to 3",
        ),
        (lambda f: f.attrs.__delitem__("tristill_shard"), "has no attribute tristill_shard"),
        (lambda f: f.attrs.__setitem__("tristill_shard", np.bytes_(b"{}")), "it says it holds {}"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_hostile_shard_is_refused_before_it_is_read(small_cache: Cache, change: object, message: str) -> None:
    rewrite(small_cache.folder / "train-00000.h5", change)
    with pytest.raises(CacheError, match=message):
        open_cache(small_cache.folder).window("train", 0)


def test_a_frame_that_declares_another_size_is_not_decompressed(small_cache: Cache) -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(10_000_000))
    bare = zstandard.ZstdCompressor(write_checksum=False).compress(bytes(56))
    good = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(56))
    for frame, message in (
        (bomb, "its frame declares 10000000 bytes, expected 56"),
        (bare, "its frame has no checksum"),
        (good + b"more", "its stored bytes are damaged"),
    ):
        rewrite(
            small_cache.folder / "train-00000.h5",
            lambda file, frame=frame: file["input_ids"].id.write_direct_chunk((0, 0), frame),
        )
        with pytest.raises(CacheCorruptError, match=message):
            open_cache(small_cache.folder).window("train", 0)


def test_a_link_in_place_of_a_shard_is_refused(small_cache: Cache, tmp_path: Path) -> None:
    shard = small_cache.folder / "train-00000.h5"
    elsewhere = tmp_path / "elsewhere.h5"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    with pytest.raises(CacheCorruptError, match=r"train-00000\.h5"):
        open_cache(small_cache.folder).window("train", 0)


def test_a_shard_of_another_cache_is_told_apart_by_field(small_cache: Cache, tmp_path: Path) -> None:
    write_cache(tmp_path / "other", make_spec(teacher_fingerprint="d" * 64)).close()
    shutil.copy(tmp_path / "other" / "train-00000.h5", small_cache.folder)
    with pytest.raises(CacheMismatchError, match=f"teacher_fingerprint: found {'d' * 64}, expected {'c' * 64}"):
        open_cache(small_cache.folder).window("train", 0)


def test_writer_refuses_a_folder_with_another_cache_and_leaves_it_alone(small_cache: Cache) -> None:
    before = {path.name: path.read_bytes() for path in small_cache.folder.iterdir()}
    spec = make_spec(profile=PlainTopKProfile(top_k=5, temperature=1.0))
    with pytest.raises(CacheMismatchError, match=r"profile.temperature: found 2.0, expected 1.0.*--force"):
        CacheWriter(small_cache.folder, spec, b"{}")
    assert before == {path.name: path.read_bytes() for path in small_cache.folder.iterdir()}


def test_reader_refuses_another_tokenizer(small_cache: Cache) -> None:
    (small_cache.folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(
        CacheMismatchError, match=r"tokenizer.json: found a tokenizer with fingerprint 44136f.*which made"
    ):
        open_cache(small_cache.folder)
    assert "tokenizer.json: found SHA-256 44136f" in verify_cache(small_cache.folder, silent)[0]
