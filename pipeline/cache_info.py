"""What a cache holds: from its manifest alone, and from a sample of its chunks."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tristill.cache import CacheError, open_cache
from tristill.cache.histograms import sample
from tristill.cache.layout import TABLES_NAME
from tristill.cache.manifest import load_manifest
from tristill.cache.remote import named_place
from tristill.pipeline.errors import StaleError
from tristill.pipeline.provenance import PROVENANCE_NAME, read_provenance


def cache_info(folder: Path) -> dict[str, Any]:
    """Spec and sizes: positions per split, bytes per position per dataset and on disk in all. Reads no shard.

    Positions are those that count; `windows_positions`, all of those in the windows.
    """
    manifest = load_manifest(folder)
    spec = manifest.spec
    positions = sum(spec.num_positions(split) for split in spec.splits)
    stored: dict[str, int] = {}
    for shard in manifest.shards:
        for name, num_bytes in shard.stored_bytes.items():
            stored[name] = stored.get(name, 0) + num_bytes
    tables = folder / TABLES_NAME
    tables_bytes = tables.stat().st_size if spec.tables_fingerprint and tables.is_file() else 0
    file_bytes = sum(shard.file_bytes for shard in manifest.shards) + tables_bytes
    return {
        "folder": named_place(folder),
        "shards": len(manifest.shards),
        "positions": {split: spec.num_positions(split) for split in sorted(spec.splits)},
        "windows_positions": {
            split: spec.splits[split].num_windows * spec.context_length for split in sorted(spec.splits)
        },
        "file_bytes": file_bytes,
        "bytes_per_position": {
            **{dataset.name: stored[dataset.name] / positions for dataset in spec.datasets},
            **({TABLES_NAME: tables_bytes / positions} if spec.tables_fingerprint else {}),
            "on disk": file_bytes / positions,
        },
        "spec": spec.model_dump(mode="json"),
        "calibration": manifest.calibration.model_dump(mode="json") if manifest.calibration else None,
    }


def cache_details(folder: Path) -> dict[str, Any]:
    """What cache_info leaves out: where the cache comes from, and histograms of a sample of its positions.

    `sample` is null, with the reason in `sample_error`, if chunks cannot be read.
    """
    found: dict[str, Any] = {"provenance": _provenance(folder), "sample": None, "sample_error": None}
    try:
        cache = open_cache(folder)
        try:
            found["sample"] = asdict(sample(cache))
        finally:
            cache.close()
    except CacheError as exc:
        found["sample_error"] = str(exc)
    return found


def _provenance(folder: Path) -> dict[str, Any] | None:
    """Who made the cache, how and when: the last is when the record was written, in UTC."""
    try:
        record = read_provenance(folder)
    except StaleError as exc:
        return {"error": str(exc)}
    if record is None:
        return None
    written = datetime.fromtimestamp((folder / PROVENANCE_NAME).stat().st_mtime, UTC)
    kept = record.model_dump(mode="json", include={"step", "status", "command", "versions", "elapsed_s"})
    return {**kept, "recorded_at": written.isoformat(timespec="seconds")}
