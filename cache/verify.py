"""Finds any damaged byte of a cache."""

from collections.abc import Callable
from pathlib import Path

from cache.errors import CacheCorruptError, CacheError
from cache.hashing import sha256_of_file
from cache.layout import TOKENIZER_NAME
from cache.manifest import load_manifest
from cache.writer import verified_record


def verify_cache(folder: Path, on_shard: Callable[[int], object]) -> list[str]:
    """One line per damaged file; empty when every byte is what the dump wrote.

    Every shard is hashed against the manifest and every frame decompressed. `on_shard` is told the size of each shard
    when it is done. A damaged manifest raises, since then nothing is known of the rest.
    """
    manifest = load_manifest(folder)
    problems = []
    for record, shard in zip(manifest.shards, manifest.ranges, strict=True):
        path = folder / record.name
        try:
            if verified_record(path, manifest.spec, shard) != record:
                raise CacheCorruptError(f"{path}: its bytes differ from those the manifest was written for")
        except CacheError as exc:
            problems.append(str(exc))
        on_shard(record.file_bytes)
    tokenizer = folder / TOKENIZER_NAME
    if not tokenizer.is_file() or sha256_of_file(tokenizer) != manifest.spec.tokenizer_fingerprint:
        problems.append(f"{tokenizer}: is missing or is not the tokenizer that made this cache")
    return problems
