"""Puts right what can be put right from what is there: the manifest from the shards, and files from verified copies.

Nothing here needs a teacher. What the shards say is taken only after the checks of docs/format.md, section 9, and a
file is replaced only by bytes whose SHA-256 was recorded.
"""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path

from tristill.cache.atomic import sync_folder, write_atomically
from tristill.cache.errors import CacheCorruptError, CacheError, CacheMissingError
from tristill.cache.layout import COMPANION_NAMES, SHARD_NAME, TABLES_NAME, ShardRange, shard_ranges
from tristill.cache.manifest import Manifest, ShardRecord
from tristill.cache.regular_file import IrregularFileError, sha256_of_regular_file
from tristill.cache.shard import spec_of_shard
from tristill.cache.spec import CacheSpec
from tristill.cache.tables import stored_calibration
from tristill.cache.verify import OnShard, checked_shards, tables_damage

SCRATCH_NAME = ".repair.partial"
_NAMES_SHOWN = 5


def manifest_of_shards(folder: Path, on_shard: OnShard, workers: int | None = None) -> Manifest:
    """The manifest of the shards and tables in `folder`, each byte of which was checked; nothing is written.

    It is what the dump wrote, byte for byte, since every shard carries the whole spec. Raises CacheMissingError if not
    all shards are there that the spec declares, CacheCorruptError with one line per file if any is damaged.
    """
    found = sorted(path.name for path in folder.iterdir() if SHARD_NAME.match(path.name))
    spec = _spec_of_any(folder, found)
    missing = [shard.name for shard in islice(_missing(spec, set(found)), _NAMES_SHOWN + 1)]
    if missing:
        names = ", ".join([*missing[:_NAMES_SHOWN], *(["and more"] if len(missing) > _NAMES_SHOWN else [])])
        raise CacheMissingError(
            f"{folder}: found {len(found)} shards, but the cache that they belong to also has {names}; run `tristill "
            "dump-logits`, which keeps the good shards and writes the others and the manifest"
        )
    records, problems = [], []
    for seen in checked_shards(folder, spec, on_shard, workers):
        if isinstance(seen, ShardRecord):
            records.append(seen)
        else:
            problems.append(str(seen))
    problems += [damage.text for damage in tables_damage(folder, spec)]
    if problems:
        raise CacheCorruptError(
            "\n".join(problems) + f"\n{folder}: without these files no manifest can be made from the rest; run "
            "`tristill dump-logits`, which keeps the good shards and writes the others and the manifest"
        )
    companions = {name: sha256_of_regular_file(folder / name) for name in COMPANION_NAMES if (folder / name).is_file()}
    return Manifest(
        spec=spec,
        shards=tuple(records),
        calibration=stored_calibration(folder, spec),
        companions=companions,
    )


def _spec_of_any(folder: Path, names: list[str]) -> CacheSpec:
    """The spec of the first shard that still tells it; all others are held against it afterwards."""
    problems = []
    for name in names:
        try:
            return spec_of_shard(folder / name)
        except CacheError as exc:
            problems.append(str(exc))
    why = f", none of which says what this cache was; the first: {problems[0]}" if problems else ""
    raise CacheMissingError(f"{folder}: found {len(names)} shards{why}; run `tristill dump-logits` to make a cache")


def _missing(spec: CacheSpec, found: Collection[str]) -> Iterator[ShardRange]:
    return (shard for shard in shard_ranges(spec) if shard.name not in found)


def restore_copy(folder: Path, source: Path, sha256: str) -> bool:
    """Whether `source`, a tokenizer or what goes with one, has that SHA-256; then it is copied into `folder`."""
    if not source.is_file():
        return False
    content = source.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        return False
    write_atomically(folder / source.name, content)
    return True


def lend_good_files(folder: Path, manifest: Manifest, damaged: Collection[str]) -> Path:
    """A scratch folder inside the cache with all its good shards and tables, in which a dump writes only the others.

    The files are hard links where the file system has them: a dump replaces files and never writes into one.
    """
    scratch = folder / SCRATCH_NAME
    scratch.mkdir()
    for name in _expected_sha256(manifest).keys() - set(damaged):
        try:
            os.link(folder / name, scratch / name, follow_symlinks=False)
        except OSError:
            shutil.copyfile(folder / name, scratch / name)
    return scratch


def take_back(folder: Path, manifest: Manifest, damaged: Collection[str]) -> list[str]:
    """Empties the scratch folder; those of the damaged files that lay there as the manifest declares them are in place.

    Does nothing where there is no scratch folder. What a killed repair left there is taken back likewise.
    """
    scratch = folder / SCRATCH_NAME
    if scratch.is_symlink():
        raise CacheCorruptError(f"{scratch}: is a link, and no repair makes one; delete it and run the command again")
    if not scratch.is_dir():
        return []
    expected = _expected_sha256(manifest)
    good = [name for name in damaged if name in expected and _has_sha256(scratch / name, expected[name])]
    for name in good:
        (scratch / name).replace(folder / name)
    sync_folder(folder)
    shutil.rmtree(scratch)
    return good


def _expected_sha256(manifest: Manifest) -> dict[str, str]:
    tables = manifest.spec.tables_fingerprint
    shards = {record.name: record.sha256 for record in manifest.shards}
    return {**shards, TABLES_NAME: tables} if tables else shards


def _has_sha256(path: Path, sha256: str) -> bool:
    try:
        return sha256_of_regular_file(path) == sha256
    except (FileNotFoundError, IrregularFileError):
        return False
