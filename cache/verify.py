"""Finds any damaged byte of a cache."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tristill.cache.errors import CacheCorruptError, CacheError, CacheMismatchError, CacheMissingError
from tristill.cache.layout import MANIFEST_NAME, TABLES_NAME, ShardRange, shard_ranges
from tristill.cache.manifest import Manifest, ShardRecord, load_manifest
from tristill.cache.regular_file import IrregularFileError, sha256_of_regular_file
from tristill.cache.remote import copied_from, remote_copy
from tristill.cache.shard_files import LocalShardFiles, ShardFiles
from tristill.cache.spec import CacheSpec
from tristill.cache.tables import stored_calibration
from tristill.cache.writer import verified_record

OnShard = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Damage:
    """One file that is not what the manifest says. `text` says what was found and where.

    `is_whole`: the file passes all checks of its own, so that it may be the manifest that is wrong.
    """

    name: str
    text: str
    is_whole: bool = False


def verify_cache(folder: Path, on_shard: OnShard, workers: int | None = None) -> list[str]:
    """One line per damaged file; empty when every byte is what the dump wrote. See find_damage.

    A damaged manifest raises, since then nothing is known of the rest.
    """
    return [damage.text for damage in find_damage(folder, load_manifest(folder), on_shard, workers)]


def find_damage(folder: Path, manifest: Manifest, on_shard: OnShard, workers: int | None = None) -> list[Damage]:
    """Every damaged file, in the order of the manifest, whatever the number of threads.

    Every shard is hashed against the manifest and every frame decompressed; it is fetched first if it is at a URL.
    `on_shard` is told the size of each shard when it and those before it are done.
    """
    copy = remote_copy(folder)
    url = copied_from(folder) if copy is None else None
    if url and not all(os.path.lexists(folder / record.name) for record in manifest.shards):
        raise CacheMissingError(
            f"{folder}: is a local copy of {url}, of which not all shards are here; set cache.url to that, or give it "
            "in place of the folder"
        )
    files = copy.shard_files(manifest) if copy else None
    found = checked_shards(folder, manifest.spec, on_shard, workers, files)
    damages = []
    for record, seen in zip(manifest.shards, found, strict=True):
        if isinstance(seen, CacheError):
            damages.append(Damage(record.name, str(seen), is_whole=isinstance(seen, CacheMismatchError)))
        elif seen != record:
            text = f"{folder / record.name}: its bytes differ from those the manifest was written for"
            damages.append(Damage(record.name, text, is_whole=True))
    damages += tables_damage(folder, manifest.spec) or _calibration_damage(folder, manifest)
    return damages + tokenizer_damage(folder, manifest)


def checked_shards(
    folder: Path, spec: CacheSpec, on_shard: OnShard, workers: int | None = None, files: ShardFiles | None = None
) -> list[ShardRecord | CacheError]:
    """Of every shard that a spec declares, its record, or what is wrong with it: see verified_record.

    `files` says where they are, if not in the folder. In `workers` threads, as many as there are cores if None: hashing
    and decompression leave the interpreter free.
    """

    def check(shard: ShardRange) -> ShardRecord | CacheError:
        try:
            with places.held(shard.name) as path:
                sizes[shard.name] = path.lstat().st_size if os.path.lexists(path) else 0
                return verified_record(path, spec, shard)
        except (CacheCorruptError, CacheMismatchError) as exc:
            return exc

    places = files or LocalShardFiles(folder)
    sizes: dict[str, int] = {}
    found = []
    with ThreadPoolExecutor(workers or os.cpu_count(), thread_name_prefix="cache-verify") as pool:
        for shard, seen in zip(shard_ranges(spec), pool.map(check, shard_ranges(spec)), strict=True):
            found.append(seen)
            on_shard(sizes.get(shard.name, 0))
    return found


def tables_damage(folder: Path, spec: CacheSpec) -> list[Damage]:
    """What is wrong with the file of tables, if the spec declares one."""
    path, expected = folder / TABLES_NAME, spec.tables_fingerprint
    if expected is None:
        return []
    try:
        found = sha256_of_regular_file(path)
    except FileNotFoundError:
        return [Damage(TABLES_NAME, f"{path}: is missing; the coded parts of every shard need it")]
    except IrregularFileError as exc:
        return [Damage(TABLES_NAME, f"{path}: {exc}; the coded parts of every shard need it")]
    if found == expected:
        return []
    return [Damage(TABLES_NAME, f"{path}: found SHA-256 {found}, expected {expected}; its bytes are damaged")]


def tokenizer_damage(folder: Path, manifest: Manifest) -> list[Damage]:
    """Damage of the tokenizer and of the files that go with it."""
    return [
        Damage(name, f"{folder / name}: {problem}")
        for name, sha256 in manifest.copied.items()
        if (problem := copied_file_problem(folder / name, sha256))
    ]


def copied_file_problem(path: Path, sha256: str) -> str | None:
    """Why a file is not the one of that SHA-256; None if it is."""
    try:
        found = sha256_of_regular_file(path)
    except IrregularFileError as exc:
        return str(exc)
    except FileNotFoundError:
        return "is missing"
    return None if found == sha256 else f"found SHA-256 {found}, expected {sha256}, of the file that was dumped"


def _calibration_damage(folder: Path, manifest: Manifest) -> list[Damage]:
    if stored_calibration(folder, manifest.spec) == manifest.calibration:
        return []
    text = f"{folder / MANIFEST_NAME}: its calibration is not the one that stands in {TABLES_NAME}"
    return [Damage(MANIFEST_NAME, text, is_whole=True)]
