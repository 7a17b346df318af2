"""What very large runs take: measures what docs/scale.md counts from, and makes the tables of that page.

    python -m benchmarks.scale [--run-dir runs/demo]        (some two minutes)
    python -m benchmarks.scale --tables                     (from what was measured before)
    python -m tristill.pipeline.reference                            (puts the tables into the page)

Needs a finished run: its data, teacher and cache. The run's own cache is measured as it is; of the other profiles a
sample of windows is dumped. Seconds are of the processor, one thread, so that other work on the machine hardly counts.
Writes benchmarks/results/scale.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import scale_model, scale_reader
from benchmarks.environment import environment
from tristill.cache import CacheWriter, open_cache
from tristill.cache.layout import TABLES_NAME
from tristill.cache.manifest import load_manifest
from tristill.cache.profiles.sampled import SampledProfile
from tristill.cache.profiles.topk import TopKProfile
from tristill.cache.reader import Cache
from tristill.cache.verify import checked_shards
from tristill.pipeline.cache_info import cache_info
from tristill.pipeline.config import load_config
from tristill.pipeline.provenance import read_provenance
from tristill.stages.data.tokenized import load_corpus
from tristill.stages.dump.config import DenseSettings, ProfileSettings
from tristill.stages.dump.dump import dump_logits
from tristill.stages.threads import torch_threads

RESULTS = Path(__file__).parent / "results" / "scale.json"
SAMPLED_PROFILES: tuple[ProfileSettings, ...] = (SampledProfile(draws=12), TopKProfile(), DenseSettings())
HIDDEN_RESULTS = Path(__file__).parent / "results" / "hidden_fidelity.json"
HIDDEN_CODINGS = ("int8", "transform, error 0.05, delta")
OPENED_SHARDS = (10_000, 100_000)
REFUSED_SHARDS = 1_000_000
RANKS = (8, 64, 1000)
BATCH_WINDOWS = 1024
_ROUNDS = 2
_KEPT = {"sampled": "draw_unique", "topk": "head_count", "transform": "head_count"}


def measured_cache(folder: Path) -> dict[str, Any]:
    """Bytes per position of a cache by what they are of, ids kept per position, and positions/s of one core.

    encode: from arrays to a shard on disk, entropy coding, compression, checksums and all. decode: `stream` with one
    thread, an epoch of shuffled batches with their targets. Both are the best of some rounds. The shard that is written
    is the one that was read, byte for byte.
    """
    info = cache_info(folder)
    parts = dict(info["bytes_per_position"])
    tables_per_position, _ = parts.pop(TABLES_NAME, 0.0), parts.pop("on disk")
    cache = open_cache(folder)
    spec = cache.spec
    kept = _KEPT.get(spec.profile.kind)
    encoded, decoded = timed_coding(cache)
    batch = cache.chunk("train", 0)
    return {
        "profile": spec.profile.model_dump(mode="json"),
        "vocab_size": spec.vocab_size,
        "width": int(getattr(spec.profile, "width", 0)),
        "ids_bytes": parts.pop("input_ids"),
        "signals_bytes": parts.pop("teacher_entropy") + parts.pop("label_log_prob"),
        "target_bytes": sum(parts.values()),
        "decoded_bytes": sum(array.num_bytes for array in spec.arrays) / spec.context_length,
        "kept_ids": float(batch.target[kept].mean()) if kept else 0.0,
        "tables_bytes": tables_per_position * sum(info["positions"].values()),
        "encode_positions_per_s": encoded,
        "decode_positions_per_s": decoded,
    }


def timed_coding(cache: Cache) -> tuple[float, float]:
    """Positions/s of one core (writing the first shard, reading all shards) of the train split."""
    spec = cache.spec
    shard = next(shard for shard in cache.manifest.ranges if shard.split == "train")
    record = next(record for record in cache.manifest.shards if record.name == shard.name)
    chunks = range(-(-shard.num_windows // spec.windows_per_chunk))
    blocks = [cache._read_block("train", chunk, spec.parts) for chunk in chunks]  # noqa: SLF001
    arrays = {name: np.concatenate([block[name] for block in blocks])[: shard.num_windows] for name in blocks[0]}
    arrays |= largest_first(arrays)
    best_write = best_read = float("inf")
    tables_image = (cache.folder / TABLES_NAME).read_bytes() if spec.tables_fingerprint else None
    for _ in range(_ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            writer = CacheWriter(Path(folder), spec, cache.tokenizer_path.read_bytes(), tables_image)
            started = time.process_time()
            own = writer.shard(shard)
            own.append(arrays)
            own.commit()
            best_write = min(best_write, time.process_time() - started)
            assert (Path(folder) / shard.name).read_bytes() == (cache.folder / record.name).read_bytes()
        started = time.process_time()
        seen = 0
        for batch in cache.stream("train", 8, seed=0, threads=1):
            seen += batch.input_ids[:, 1:].size
        best_read = min(best_read, (time.process_time() - started) / seen)
    return shard.num_windows * spec.context_length / best_write, 1 / best_read


def largest_first(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Heads as a writer wants them, the largest logit of a position first; empty if there are none."""
    if "head_count" not in arrays:
        return {}
    kept = np.arange(arrays["head_ids"].shape[-1]) < arrays["head_count"][..., None]
    order = np.argsort(np.where(kept, -arrays["head_logits"].astype(np.float32), np.inf), axis=-1, kind="stable")
    return {name: np.take_along_axis(arrays[name], order, axis=-1) for name in ("head_ids", "head_logits")}


def measured_profiles(config_path: Path, run_dir: Path, num_windows: int) -> dict[str, Any]:
    """measured_cache of the run's own cache, and of samples of the other profiles, by kind."""
    config = load_config(config_path).cache
    own = measured_cache(run_dir / "cache")
    found = {}
    with torch_threads(1):
        for profile in SAMPLED_PROFILES:
            with tempfile.TemporaryDirectory() as folder:
                settings = config.model_copy(update={"profile": profile, "max_train_windows": num_windows})
                dump_logits(settings, run_dir / "data", run_dir / "teacher", Path(folder))
                found[profile.kind] = measured_cache(Path(folder))
    return {**found, own["profile"]["kind"]: own}


def measured_reader(like: Path) -> dict[str, Any]:
    """What caches of very many shards take to open, and how ranks read the first of them."""
    opened, reading = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for num_shards in (*OPENED_SHARDS, REFUSED_SHARDS):
            folder, with_files = Path(scratch) / str(num_shards), num_shards != REFUSED_SHARDS
            spec = scale_reader.simulated_cache(like, folder, num_shards, with_files=with_files)
            opened[str(num_shards)] = scale_reader.measured_opening(folder)
            if num_shards == OPENED_SHARDS[0]:
                reading = scale_reader.simulated_epoch(spec, RANKS, BATCH_WINDOWS)
    return {"opening": opened, "reading": reading}


def hidden_bytes() -> dict[str, float]:
    """Bytes of a hidden layer per position and unit of width, by coding: the mean over the measured layers."""
    measured = json.loads(HIDDEN_RESULTS.read_text(encoding="utf-8"))
    found = {row["coding"]: row["layers"] for row in measured["rows"]}
    return {
        coding: statistics.mean(layer["bytes_per_position"] for layer in found[coding]) / measured["width"]
        for coding in HIDDEN_CODINGS
    }


def tokenized_per_s(data: Path) -> float:
    """Tokens/s of the run's own tokenize step, its tokenizer included."""
    corpus, record = load_corpus(data), read_provenance(data)
    assert record is not None
    assert record.elapsed_s is not None
    return sum(split.tokens for split in corpus.splits.values()) / record.elapsed_s


def verified_bytes_per_s(folder: Path) -> float:
    """Bytes of shards on disk that one core verifies in a second: decompressed, and hashed."""
    sizes: list[int] = []
    started = time.process_time()
    checked_shards(folder, load_manifest(folder).spec, sizes.append, workers=1)
    return sum(sizes) / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--windows", type=int, default=128, help="of the train split, in samples of other profiles")
    parser.add_argument("--tables", action="store_true", help="measure nothing, make the tables again")
    arguments = parser.parse_args()
    if arguments.tables:
        result = json.loads(RESULTS.read_text(encoding="utf-8"))
    else:
        result = {
            "profiles": measured_profiles(arguments.config, arguments.run_dir, arguments.windows),
            "hidden_bytes_per_width": hidden_bytes(),
            "tokenized_per_s": tokenized_per_s(arguments.run_dir / "data"),
            "verified_bytes_per_s": verified_bytes_per_s(arguments.run_dir / "cache"),
            **measured_reader(arguments.run_dir / "cache"),
            "environment": environment(),
        }
    result["tables"] = scale_model.tables(result)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, table in result["tables"].items():
        print(f"{name}\n{table}\n")


if __name__ == "__main__":
    main()
