"""Bytes of a cache: as they are on disk, and of a whole one from a small one."""

import math
from collections.abc import Mapping
from pathlib import Path

from tristill.cache.layout import MANIFEST_NAME, TABLES_NAME, TOKENIZER_NAME
from tristill.cache.manifest import Manifest, load_manifest
from tristill.cache.spec import CacheSpec
from tristill.pipeline.plan.prediction import CachePrediction

LARGEST_DOUBLINGS = 2.0


def windows_positions(spec: CacheSpec) -> dict[str, int]:
    """Positions of every split's windows, whether they count or not: what a plan counts in, known beforehand."""
    return {split: spec.splits[split].num_windows * spec.context_length for split in sorted(spec.splits)}


def cache_sizes(folder: Path, basis: str) -> CachePrediction:
    """What a finished cache takes, as a plan counts it."""
    manifest = load_manifest(folder)
    once = _bytes_once(folder)
    datasets = {name: float(sum(shard.stored_bytes[name] for shard in manifest.shards)) for name in _datasets(manifest)}
    tables = {TABLES_NAME: float(once[TABLES_NAME])} if TABLES_NAME in once else {}
    return CachePrediction(
        positions=windows_positions(manifest.spec),
        dataset_bytes=datasets | tables,
        total_bytes=sum(shard.file_bytes for shard in manifest.shards) + sum(once.values()),
        basis=basis,
    )


def scaled(folder: Path, positions: Mapping[str, int], basis: str) -> CachePrediction:
    """What a cache like that in `folder` takes with so many positions per split.

    Datasets grow with the positions of their split, what a shard takes beside them with the number of shards and of
    chunks, the manifest with the number of shards; the tables and the tokenizer are there once.
    """
    manifest = load_manifest(folder)
    spec, once = manifest.spec, _bytes_once(folder)
    datasets = dict.fromkeys(_datasets(manifest), 0.0)
    for split, wanted in positions.items():
        shards = [shard for shard in manifest.shards if shard.split == split]
        held = sum(shard.num_windows for shard in shards) * spec.context_length
        for name in datasets:
            datasets[name] += sum(shard.stored_bytes[name] for shard in shards) / held * wanted
    per_shard = spec.windows_per_shard * spec.context_length
    num_shards = sum(-(-wanted // per_shard) for wanted in positions.values())
    beside = sum(shard.file_bytes - sum(shard.stored_bytes.values()) for shard in manifest.shards)
    records = sum(len(shard.model_dump_json()) + 1 for shard in manifest.shards)
    once[MANIFEST_NAME] += (num_shards - len(manifest.shards)) * records / len(manifest.shards)
    tables = {TABLES_NAME: once[TABLES_NAME]} if TABLES_NAME in once else {}
    return CachePrediction(
        positions=dict(sorted(positions.items())),
        dataset_bytes=datasets | tables,
        total_bytes=sum(datasets.values()) + sum(once.values()) + num_shards * beside / len(manifest.shards),
        basis=basis,
    )


def extrapolated(young: CachePrediction, old: CachePrediction, ages: tuple[int, int], steps: int) -> CachePrediction:
    """What a teacher of so many steps leaves, from two that were trained for fewer: linear in the logarithm of steps.

    A line through two ages was found to hold for two doublings at most; no more are taken (docs/log.md).
    """
    first, last = ages
    doublings = math.log2(steps / last)
    ahead = min(doublings, LARGEST_DOUBLINGS) / math.log2(last / first)
    datasets = {
        name: max(0.0, num_bytes + ahead * (num_bytes - young.dataset_bytes[name]))
        for name, num_bytes in old.dataset_bytes.items()
    }
    basis = f"from teachers of {first:,} and {last:,} steps to one of {steps:,}"
    if doublings > LARGEST_DOUBLINGS:
        basis += ", too far for more than a guess: plan again when the teacher is trained"
    total = old.total_bytes + sum(datasets.values()) - sum(old.dataset_bytes.values())
    return old.model_copy(update={"dataset_bytes": datasets, "total_bytes": total, "basis": basis})


def _datasets(manifest: Manifest) -> list[str]:
    return [dataset.name for dataset in manifest.spec.datasets]


def _bytes_once(folder: Path) -> dict[str, float]:
    """Bytes of the files that are there once, by name."""
    paths = [folder / name for name in (MANIFEST_NAME, TOKENIZER_NAME, TABLES_NAME)]
    return {path.name: float(path.stat().st_size) for path in paths if path.is_file()}
