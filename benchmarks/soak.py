"""A large cache streamed for epochs: resident set, order and speed of every epoch.

    python -m benchmarks.soak [--positions 20000000] [--epochs 4] [--folder runs/soak]

The teacher is a random one: some chunks of draws are encoded once, and written again and again under other ids, so
that making the cache takes a minute. Every window begins with its own number: the order in which windows come is
compared, by checksum, with that of WindowOrder. The resident set is sampled all the time, and its peak noted for each
epoch. Threads, batches and targets are those of training.
"""

import argparse
import hashlib
import json
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from benchmarks.environment import environment
from tristill.cache import Cache, CacheSpec, CacheWriter, SplitSpec, open_cache
from tristill.cache.calibration import Calibration, FidelityPoint
from tristill.cache.coding.streams import Histograms
from tristill.cache.layout import DEFAULT_SHARD_POSITIONS, default_windows_per_chunk, windows_per_shard
from tristill.cache.order import Deal
from tristill.cache.profiles.profile import Place
from tristill.cache.profiles.sampled import SampledProfile
from tristill.cache.tables import tables_image
from tristill.pipeline.results import text_table
from tristill.stages.resources import keep_freed_memory
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.source import Epoch, Signals

RESULTS = Path(__file__).parent / "results" / "soak.json"
VOCAB_SIZE, CONTEXT_LENGTH, BATCH_WINDOWS = 2048, 256, 8
_TOKENIZER_JSON = b"{}"
_DISTINCT_CHUNKS = 8
_SAMPLED_EVERY_S = 0.02


@dataclass(frozen=True)
class EpochSeen:
    """What was seen of one epoch."""

    positions_per_s: float
    peak_rss_mib: float
    is_in_order: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=20_000_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    arguments = parser.parse_args()
    keep_freed_memory()
    started = time.perf_counter()
    cache = synthetic_cache(arguments.folder, arguments.positions)
    made_s = time.perf_counter() - started
    seen = [streamed(cache, epoch) for epoch in range(arguments.epochs)]
    rows = [
        [
            str(number),
            f"{epoch.positions_per_s:,.0f}",
            f"{epoch.peak_rss_mib:.0f}",
            f"{epoch.peak_rss_mib / seen[0].peak_rss_mib - 1:+.1%}",
            "exact" if epoch.is_in_order else "WRONG",
        ]
        for number, epoch in enumerate(seen)
    ]
    result = {
        "positions": cache.spec.num_positions("train"),
        "shards": len(cache.manifest.shards),
        "made_s": made_s,
        "epochs": [asdict(epoch) for epoch in seen],
        "environment": environment(),
        "markdown": text_table([["epoch", "positions/s", "peak RSS, MiB", "over the first epoch", "order"], *rows]),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(result["markdown"])


def streamed(cache: Cache, number: int) -> EpochSeen:
    """One epoch, watched."""
    source = CachedSource(cache, torch.device("cpu"))
    epoch = Epoch(seed=0, number=number)
    expected = hashlib.sha256()
    for part in source.order("train", epoch).batches(Deal(BATCH_WINDOWS)):
        expected.update(part.astype("<i8").tobytes())
    found, positions = hashlib.sha256(), 0
    with PeakRss() as watch:
        started = time.perf_counter()
        for batch in source.batches("train", BATCH_WINDOWS, Signals(targets=True), epoch):
            ids_B2 = batch.input_ids_BT[:, :2].numpy()
            found.update((ids_B2[:, 0] + VOCAB_SIZE * ids_B2[:, 1]).astype("<i8").tobytes())
            positions += batch.input_ids_BT.numel()
        elapsed_s = time.perf_counter() - started
    return EpochSeen(positions / elapsed_s, watch.peak_mib, found.digest() == expected.digest())


class PeakRss:
    """The largest resident set of this process while it is watched, sampled: `peak_rss_mib` never falls."""

    def __enter__(self) -> Self:
        self.peak_mib = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        page_mib = resource.getpagesize() / 2**20
        while not self._done.wait(_SAMPLED_EVERY_S):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            self.peak_mib = max(self.peak_mib, pages * page_mib)


def synthetic_cache(folder: Path, positions: int, shard_positions: int = DEFAULT_SHARD_POSITIONS) -> Cache:
    """A cache of profile `sampled` of at least so many positions; what is there already is kept."""
    profile = SampledProfile()
    per_chunk = default_windows_per_chunk(CONTEXT_LENGTH)
    num_windows = -(-positions // (per_chunk * CONTEXT_LENGTH)) * per_chunk
    chunks = list(_random_chunks(profile, per_chunk))
    place = Place("train", 0, per_chunk, CONTEXT_LENGTH)

    def spec_of(fingerprint: str) -> CacheSpec:
        return CacheSpec(
            vocab_size=VOCAB_SIZE,
            end_of_text_id=0,
            context_length=CONTEXT_LENGTH,
            profile=profile,
            splits={"train": SplitSpec(num_windows=num_windows, bytes_per_token=3, fingerprint="a" * 64)},
            windows_per_chunk=per_chunk,
            windows_per_shard=windows_per_shard(CONTEXT_LENGTH, shard_positions),
            teacher_fingerprint="b" * 64,
            tokenizer_fingerprint=hashlib.sha256(_TOKENIZER_JSON).hexdigest(),
            tables_fingerprint=fingerprint,
        )

    draft = spec_of("0" * 64)
    part = draft.target_part
    tables = {"ids_by_rank": np.arange(VOCAB_SIZE)}
    coder, histograms = profile.make_coder(tables), Histograms(part.models)
    for arrays in chunks:
        coder.write({name: place.gathered(array) for name, array in arrays.items()}, place, histograms)
    tables |= histograms.frequencies()
    image = tables_image(draft.tables, {f"target.{name}": table for name, table in tables.items()}, _calibration())
    writer = CacheWriter(folder, spec_of(hashlib.sha256(image).hexdigest()), _TOKENIZER_JSON, image)
    compressor = writer.compressor()
    (dataset,) = draft.datasets_of(part)
    payloads = [writer.coder("target").encode(arrays, place) for arrays in chunks]
    targets = [compressor.compress(payload.ljust(dataset.array.num_bytes, b"\0")) for payload in payloads]
    generator = np.random.default_rng(1)
    signal = compressor.compress(generator.integers(0, 40, (per_chunk, CONTEXT_LENGTH)).astype(np.uint8).tobytes())
    ids = generator.integers(0, VOCAB_SIZE, (per_chunk, CONTEXT_LENGTH + 1)).astype("<u2")
    for shard in writer.missing_shards():
        firsts = range(shard.first_window, shard.first_window + shard.num_windows, per_chunk)
        frames: dict[str, list[bytes]] = {"input_ids": [], "target": []}
        for first in firsts:
            numbers = np.arange(first, first + per_chunk)
            ids[:, 0], ids[:, 1] = numbers % VOCAB_SIZE, numbers // VOCAB_SIZE
            frames["input_ids"].append(compressor.compress(ids.tobytes()))
            frames["target"].append(targets[first // per_chunk % _DISTINCT_CHUNKS])
        frames |= {name: [signal] * len(firsts) for name in ("teacher_entropy", "label_log_prob")}
        writer.commit(shard, frames)
    writer.finish()
    return open_cache(folder)


def _calibration() -> Calibration:
    nothing = FidelityPoint(settings={}, bytes_per_position=0, angle_deg={}, norm_ratio={}, kl_nats={})
    return Calibration(
        request="0" * 64, student="none", positions=0, profile={}, target=None, points=(nothing,), chosen=0
    )


def _random_chunks(profile: SampledProfile, per_chunk: int) -> Iterator[dict[str, np.ndarray]]:
    """Six draws of ids that fall off as a power law, (windows, T, ..)."""
    generator = np.random.default_rng(0)
    shape = (per_chunk, CONTEXT_LENGTH)
    for _ in range(_DISTINCT_CHUNKS):
        unique = generator.integers(1, profile.draws + 1, shape)
        kept = np.arange(profile.draws) < unique[..., None]
        first = generator.zipf(1.3, shape) % (VOCAB_SIZE - 8 * profile.draws)
        steps = generator.integers(1, 8, (*shape, profile.draws))
        ids = first[..., None] + np.cumsum(steps, axis=-1)
        counts = kept.astype(np.int64)
        counts[..., 0] += profile.draws - unique
        yield {
            "draw_unique": unique.astype(np.uint8),
            "draw_ids": np.where(kept, ids, ids[..., :1]).astype("<u2"),
            "draw_counts": counts.astype(np.uint8),
        }


if __name__ == "__main__":
    main()
