"""Positions/s from shards to tensors on one core: this reader, and two streaming libraries with the same windows.

    pip install --no-deps -r benchmarks/peers.txt
    python -m benchmarks.reader_speed [--run-dir runs/demo] [--rounds 7]

Needs the data and teacher of a run (`make teacher`); dumps a cache per profile into its folder, and keeps them. First
the demo's student trains a few steps from the transform cache on all cores; then the process stays on one core. Every
round reads each cache once, shuffled, batch by batch, as training does, and the peers' files of the same decoded
arrays, at the same level of Zstandard, in stored order: once from what they compressed (MDS shards are decompressed
into files first), once more from what that left. All become the same tensors. Ratios are taken round by round.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.distill_speed import Runner
from benchmarks.environment import environment
from benchmarks.peer_readers import Litdata, Mosaic, PeerReader, window_batch, windows_of
from tristill.cache import Cache, open_cache
from tristill.pipeline.config import load_config
from tristill.pipeline.results import text_table
from tristill.stages.dump.config import DumpConfig
from tristill.stages.dump.dump import dump_logits
from tristill.stages.models.language_model import State
from tristill.stages.resources import keep_freed_memory
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.source import Epoch, Signals

RESULTS = Path(__file__).parent / "results" / "reader_speed.json"
BATCH_WINDOWS = 8
PLAIN = {"kind": "plain_topk", "top_k": 50, "logit_dtype": "float16"}
CACHES: dict[str, dict[str, Any]] = {
    "sampled": {"profile": {"kind": "sampled"}},
    "topk": {"profile": {"kind": "topk"}},
    "transform": {"profile": {"kind": "transform", "step": 0.3}},
    "dense": {"profile": {"kind": "dense"}},
    "plain_topk, 50": {"profile": PLAIN},
    "sampled, one layer in 8 bits": {
        "profile": {"kind": "sampled"},
        "hidden_layers": [2],
        "hidden": {"coding": {"kind": "int8"}},
    },
    "sampled, one layer coded": {
        "profile": {"kind": "sampled"},
        "hidden_layers": [2],
        "hidden": {"coding": {"kind": "transform"}},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--windows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES)[:-1], help="all but coded states")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, not the clock's: beside other work")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    keep_freed_memory()
    folder = arguments.run_dir / "benchmark-caches"
    caches = {name: dumped(arguments.run_dir, folder, name, arguments.windows) for name in arguments.caches}
    student = student_positions_per_s(
        arguments.config, dumped(arguments.run_dir, folder, "transform", arguments.windows)
    )

    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    measured = {}
    for name, cache in caches.items():
        measured[name] = measure(cache, folder / "peers", arguments.rounds, clock)
        print(name, measured[name]["positions_per_s"], flush=True)
    result = {
        "student_positions_per_s": student,
        "windows": arguments.windows,
        "rounds": arguments.rounds,
        "clock": clock.__name__,
        "measured": measured,
        "environment": environment(),
        "markdown": table(measured, student),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(result["markdown"])


def dumped(run_dir: Path, folder: Path, name: str, num_windows: int) -> Cache:
    """The cache of a row; made if it is not there."""
    own = folder / f"reader-{num_windows}-{name.replace(',', '').replace(' ', '-')}"
    config = DumpConfig.model_validate({**CACHES[name], "max_train_windows": num_windows})
    dump_logits(config, run_dir / "data", run_dir / "teacher", own)
    return open_cache(own)


def student_positions_per_s(config_path: Path, cache: Cache) -> float:
    """What the config's student consumes with its targets, on all cores: the median of a few steps."""
    torch.set_num_threads(os.cpu_count() or 1)
    config = load_config(config_path)
    runner = Runner(config, cache.folder, with_teacher=True)
    positions = config.distill.training.batch_windows * cache.spec.context_length
    return positions / statistics.median(runner.seconds(1) for _ in range(12))


def measure(cache: Cache, folder: Path, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Positions/s of every reader in every round, and what they read."""
    layers = cache.spec.hidden.layers if cache.spec.hidden else ()
    peers: dict[str, PeerReader] = {
        "mosaicml-streaming": Mosaic(folder / "mosaic", windows_of(cache, layers)),
        "litdata": Litdata(folder / "litdata", windows_of(cache, layers)),
    }
    source = CachedSource(cache, torch.device("cpu"))
    signals = Signals(targets=True, states=tuple(State("residual", layer) for layer in layers))
    found: dict[str, list[float]] = {}

    def note(name: str, read: Callable[[], int]) -> None:
        gc.collect()
        started = clock()
        positions = read()
        found.setdefault(name, []).append(positions / (clock() - started))

    def own(epoch: int) -> int:
        batches = source.batches("train", BATCH_WINDOWS, signals, Epoch(seed=0, number=epoch))
        return sum(batch.input_ids_BT.numel() for batch in batches)

    def theirs(peer: PeerReader) -> int:
        batches = (window_batch(cache, arrays, layers) for arrays in peer.batches(BATCH_WINDOWS))
        return sum(source._to_tensors(batch, signals).input_ids_BT.numel() for batch in batches)  # noqa: SLF001

    for epoch in range(rounds + 1):
        note("tristill", lambda: own(epoch))  # noqa: B023 - called at once
        for name, peer in peers.items():
            peer.forget()
            for suffix in ("", ", again"):
                note(f"{name}{suffix}", lambda: theirs(peer))  # noqa: B023
    positions = cache.spec.num_positions("train")
    stored = sum(shard.file_bytes for shard in cache.manifest.shards if shard.split == "train")
    return {
        "positions_per_s": {name: statistics.median(values[1:]) for name, values in found.items()},
        "rounds": {name: values[1:] for name, values in found.items()},  # the first one warms up
        "bytes_per_position": stored / positions,
        "peer_bytes_per_position": {name: peer.stored_bytes / positions for name, peer in peers.items()},
    }


def table(measured: dict[str, dict[str, Any]], student: float) -> str:
    """Speeds, and ratios as median, min to max."""
    names = ("mosaicml-streaming", "mosaicml-streaming, again", "litdata")
    titles = ["cache", "bytes/position", "positions/s", "over the student", *(f"over {name}" for name in names)]
    rows = []
    for cache, found in measured.items():
        rounds = found["rounds"]
        ratios = []
        for name in names:
            values = sorted(own / other for own, other in zip(rounds["tristill"], rounds[name], strict=True))
            ratios.append(f"{statistics.median(values):.2f}, {values[0]:.2f} to {values[-1]:.2f}")
        speed = found["positions_per_s"]["tristill"]
        rows.append([cache, f"{found['bytes_per_position']:.1f}", f"{speed:,.0f}", f"{speed / student:.0f}", *ratios])
    return text_table([titles, *rows]) + f"\n\nthe student: {student:,.0f} positions/s on all cores"


if __name__ == "__main__":
    main()
