"""What a cache holds, from its manifest alone."""

from pathlib import Path
from typing import Any

from cache.manifest import load_manifest
from pipeline.results import text_table


def cache_info(folder: Path) -> dict[str, Any]:
    """Spec and sizes: positions per split, bytes per position per dataset and on disk in all."""
    manifest = load_manifest(folder)
    spec = manifest.spec
    positions = sum(spec.num_positions(split) for split in spec.splits)
    stored: dict[str, int] = {}
    for shard in manifest.shards:
        for name, num_bytes in shard.stored_bytes.items():
            stored[name] = stored.get(name, 0) + num_bytes
    file_bytes = sum(shard.file_bytes for shard in manifest.shards)
    return {
        "folder": str(folder),
        "shards": len(manifest.shards),
        "positions": {split: spec.num_positions(split) for split in sorted(spec.splits)},
        "file_bytes": file_bytes,
        "bytes_per_position": {
            **{array.name: stored[array.name] / positions for array in spec.arrays},
            "on disk": file_bytes / positions,
        },
        "spec": spec.model_dump(mode="json"),
    }


def cache_info_text(info: dict[str, Any]) -> str:
    """The same for people."""
    spec = info["spec"]
    profile = ", ".join(f"{key} {value}" for key, value in spec["profile"].items())
    positions = ", ".join(f"{count:,} {split}" for split, count in info["positions"].items())
    lines = [
        f"cache      {info['folder']} (format version {spec['format_version']})",
        f"profile    {profile}",
        f"hidden     {spec['hidden'] or 'none'}",
        f"windows    {spec['context_length']} positions each, vocabulary {spec['vocab_size']:,}",
        f"positions  {positions}",
        f"shards     {info['shards']}, {info['file_bytes']:,} bytes",
        f"teacher    {spec['teacher_fingerprint']}",
        f"tokenizer  {spec['tokenizer_fingerprint']}",
        "",
    ]
    rows = [[name, f"{value:.2f}"] for name, value in info["bytes_per_position"].items()]
    return "\n".join(lines) + text_table([["dataset", "bytes/position"], *rows])
