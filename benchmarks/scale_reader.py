"""What opening a cache of very many shards takes, and how many of them each rank reads: by index alone, without data.

    python -m benchmarks.scale_reader FOLDER        (called by benchmarks/scale.py)

The manifest is the one that the dump would write; the shards are files of the right size that hold nothing, which
opening does not see. Measured is the code that every rank runs before its first batch, in a process of its own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tristill.cache import open_cache
from tristill.cache.errors import CacheCorruptError
from tristill.cache.hashing import canonical_json
from tristill.cache.layout import (
    MANIFEST_NAME,
    TABLES_NAME,
    TOKENIZER_NAME,
    default_windows_per_chunk,
    shard_ranges,
    windows_per_shard,
)
from tristill.cache.manifest import Manifest, load_manifest
from tristill.cache.order import SHARDS_PER_RUN, Deal, WindowOrder
from tristill.cache.spec import CacheSpec

# M batches, R ranks, S windows of a rank's share of a batch

CONTEXT_LENGTH = 4096
SHARD_POSITIONS = 2**20
RANKS_PER_MACHINE = 8
_SEED, _EPOCH = 0, 3


def simulated_cache(like: Path, folder: Path, num_shards: int, *, with_files: bool = True) -> CacheSpec:
    """A cache like a finished one, of so many shards of the train split, at a context length of 4,096; its spec.

    Tables and tokenizer are copies; the shards are holes of the size that the manifest says. Without files there is
    the manifest alone.
    """
    given = load_manifest(like)
    size = windows_per_shard(CONTEXT_LENGTH, SHARD_POSITIONS)
    train = given.spec.splits["train"].model_copy(update={"num_windows": num_shards * size})
    changes = {
        "context_length": CONTEXT_LENGTH,
        "splits": {"train": train.model_dump()},
        "windows_per_chunk": default_windows_per_chunk(CONTEXT_LENGTH),
        "windows_per_shard": size,
    }
    spec = CacheSpec.model_validate(given.spec.model_dump() | changes)
    folder.mkdir()
    with (folder / MANIFEST_NAME).open("w", encoding="ascii") as file:
        file.writelines(_manifest_text(given, spec))
    for name in (TOKENIZER_NAME, TABLES_NAME):
        if (like / name).is_file():
            shutil.copyfile(like / name, folder / name)
    if with_files:
        for shard in shard_ranges(spec):
            with (folder / shard.name).open("wb") as file:
                os.truncate(file.fileno(), given.shards[0].file_bytes)
    return spec


def _manifest_text(like: Manifest, spec: CacheSpec) -> Iterator[str]:
    """What Manifest.to_json gives, without holding all of a large one."""
    calibration = None if like.calibration is None else like.calibration.model_dump(mode="json")
    record = like.shards[0].model_dump(mode="json")
    yield f'{{"calibration":{canonical_json(calibration)},"shards":['
    for number, shard in enumerate(shard_ranges(spec)):
        own = {"name": shard.name, "first_window": shard.first_window, "num_windows": shard.num_windows}
        yield ("," if number else "") + canonical_json(record | own)
    yield f'],"spec":{spec.to_json()}}}'


def measured_opening(folder: Path) -> dict[str, Any]:
    """What a rank of its own takes to open `folder`; see `opening`."""
    command = [sys.executable, "-m", "benchmarks.scale_reader", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def opening(folder: Path) -> dict[str, Any]:
    """Seconds of CPU of every part of a rank's start, and the resident set after it at its largest so far, in MiB.

    manifest: load_manifest; where that refuses, `refused` is the reason and the same is done without its bound. open:
    open_cache, the manifest again included; None without shards. first_batch, mid_epoch: until a rank of 1,000 knows
    its windows of the first batch, and of the one in the middle of the epoch. fingerprint: that of the cache.
    """
    found: dict[str, Any] = {"manifest_bytes": (folder / MANIFEST_NAME).stat().st_size, "start_mib": peak_mib()}

    def ended(name: str, started: float) -> None:
        found[f"{name}_s"], found[f"{name}_mib"] = time.process_time() - started, peak_mib()

    started = time.process_time()
    try:
        manifest = load_manifest(folder)
        found["refused"] = None
    except CacheCorruptError as exc:
        found["refused"] = str(exc).removeprefix(f"{folder}/")
        started = time.process_time()
        manifest = Manifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())
    ended("manifest", started)
    found["open_s"] = found["open_mib"] = None
    if (folder / manifest.shards[0].name).is_file():
        started = time.process_time()
        open_cache(folder)
        ended("open", started)
    deal = Deal(1000, rank=500, world_size=1000)
    num_batches = manifest.spec.splits["train"].num_windows // 1000
    for name, first in (("first_batch", 0), ("mid_epoch", num_batches // 2)):
        started = time.process_time()
        next(order_of(manifest.spec).batches(deal, first))
        ended(name, started)
    started = time.process_time()
    found["fingerprint"] = manifest.fingerprint
    ended("fingerprint", started)
    return found


def peak_mib() -> float:
    """The largest resident set of this program so far; unlike that of getrusage not of what was forked to start it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def order_of(spec: CacheSpec) -> WindowOrder:
    windows = spec.splits["train"].num_windows
    return WindowOrder(windows, spec.windows_per_chunk, spec.windows_per_shard, _SEED, _EPOCH)


def simulated_epoch(spec: CacheSpec, world_sizes: tuple[int, ...], batch_windows: int) -> dict[str, Any]:
    """`reading` of one epoch by numbers of ranks, in batches of about `batch_windows`.

    Beside it `fetches` of the same batches dealt out in their own order, not by the numbers of windows.
    """
    windows = np.concatenate([group.windows for _, group in order_of(spec).groups()])
    found = {}
    for world_size in world_sizes:
        size = batch_windows // world_size * world_size
        batches_MB = windows[: len(windows) // size * size].reshape(-1, size)
        assert_dealt_alike(spec, batches_MB, world_size)
        plain = reading(spec, batches_MB.reshape(len(batches_MB), world_size, -1))["fetches"]
        found[str(world_size)] = reading(spec, dealt(batches_MB, world_size)) | {"fetches_in_order": plain}
    return found


def dealt(batches_MB: np.ndarray, world_size: int) -> np.ndarray:
    """(M, R, S): what each rank takes of every batch, by the numbers of windows, as Deal gives it to one of them."""
    return np.sort(batches_MB, axis=1).reshape(len(batches_MB), world_size, -1)


def assert_dealt_alike(spec: CacheSpec, batches_MB: np.ndarray, world_size: int) -> None:
    """A reader's own first batches and those in mid-epoch are these, for ranks at both ends and in the middle."""
    for first in (0, len(batches_MB) // 2):
        for rank in {0, world_size // 2, world_size - 1}:
            deal = Deal(batches_MB.shape[1], rank, world_size)
            found_MS = next(order_of(spec).batches(deal, first))
            own_MRS = dealt(batches_MB[first : first + len(found_MS)], world_size)
            assert (np.sort(found_MS, axis=1) == own_MRS[:, rank]).all(), "ranks do not take what is counted here"


def reading(spec: CacheSpec, dealt_MRS: np.ndarray) -> dict[str, float]:
    """What ranks and machines of 8 read in one epoch.

    shards_per_rank, shards_per_machine: different ones, the mean. fetches: of shards by all machines, over the number
    of shards, if a machine keeps what it fetched while a run of 64 shards lasts. at_once: different shards that a
    machine reads in the time of a run, the most. decoded: positions that are decoded over those that are used, all
    ranks together, each decoding whole chunks, once.
    """
    num_batches, world_size, share = dealt_MRS.shape
    num_windows = spec.splits["train"].num_windows
    num_shards = -(-num_windows // spec.windows_per_shard)
    num_chunks = -(-num_windows // spec.windows_per_chunk)
    num_machines = -(-world_size // RANKS_PER_MACHINE)
    ranks_R1 = np.arange(world_size)[:, None]
    machine_shards = np.unique(ranks_R1 // RANKS_PER_MACHINE * num_shards + dealt_MRS // spec.windows_per_shard)
    rank_shards = np.unique(ranks_R1 * num_shards + dealt_MRS // spec.windows_per_shard)
    rank_chunks = np.unique(ranks_R1 * num_chunks + dealt_MRS // spec.windows_per_chunk)
    run_windows = SHARDS_PER_RUN * spec.windows_per_shard
    runs_M11 = np.arange(num_batches)[:, None, None] * world_size * share // run_windows
    machines_MR1 = runs_M11 * num_machines + ranks_R1 // RANKS_PER_MACHINE
    at_once = np.unique(machines_MR1 * num_shards + dealt_MRS // spec.windows_per_shard) // num_shards
    return {
        "batch_windows": world_size * share,
        "shards_per_rank": len(rank_shards) / world_size,
        "shards_per_machine": len(machine_shards) / num_machines,
        "fetches": len(machine_shards) / num_shards,
        "at_once": int(np.bincount(at_once).max()),
        "decoded": len(rank_chunks) * spec.windows_per_chunk / dealt_MRS.size,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(json.dumps(opening(parser.parse_args().folder)))
