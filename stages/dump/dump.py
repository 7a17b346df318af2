"""Streams windows through the teacher and writes the cache; compression overlaps the teacher's forward pass."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from cache import CacheSpec, CacheWriter, SplitName
from cache.hashing import sha256_of_file
from cache.layout import TOKENIZER_NAME, ShardRange
from cache.manifest import Manifest
from cache.parts import MASK_NAME
from cache.remote import remote_copy
from cache.writer import ShardWriter
from stages.data.tokenized import load_corpus, split_windows
from stages.data.tokens import TokenWindows
from stages.dump.calibrate import as_stored
from stages.dump.config import DumpConfig
from stages.dump.ensemble import ALONE, Ensemble, load_ensemble
from stages.dump.extract import target_arrays
from stages.dump.forward import forward_windows
from stages.dump.hidden import hidden_arrays
from stages.dump.prepare import prepare
from stages.errors import CheckpointError
from stages.models.folder import load_model, pick_device
from stages.models.language_model import LanguageModel, State
from stages.models.origin import model_fingerprint
from stages.progress import Progress, waiting
from stages.targets.hidden import HiddenTransforms
from stages.threads import torch_threads

_BATCHES_AHEAD = 2
_SPLITS: tuple[SplitName, ...] = ("train", "validation")


def dump_logits(config: DumpConfig, data_folder: Path, teacher_folder: Path, folder: Path) -> Manifest:
    """Write the cache, or what is missing of it; its manifest.

    Every shard is dumped on its own, so its bytes do not depend on what was there before.
    """
    if copy := remote_copy(folder):
        copy.bring_begun()
    device = pick_device(config.device)
    teacher = load_model(teacher_folder).to(device).eval()
    corpus = load_corpus(data_folder)
    if sha256_of_file(teacher_folder / TOKENIZER_NAME) != corpus.tokenizer_sha256:
        raise CheckpointError(
            f"{teacher_folder}: the teacher was trained with another tokenizer than that of {data_folder}; run "
            "`tristill teacher --force`"
        )
    windows = {split: split_windows(data_folder, split) for split in _SPLITS}
    ensemble = load_ensemble(config, data_folder, corpus, device)
    fingerprint = config.teacher_fingerprint(model_fingerprint(teacher_folder))
    assert fingerprint is not None, "all teachers were just loaded"
    with waiting("calibration"):
        prepared = prepare(config, corpus, teacher, fingerprint, windows, folder, ensemble)
    spec = prepared.spec
    tokenizer_json = (data_folder / TOKENIZER_NAME).read_bytes()
    writer = CacheWriter(folder, spec, tokenizer_json, prepared.tables_image, config.compression_level)
    total = sum(spec.num_positions(split) for split in spec.splits)
    counts = {split: found.counts() for split, found in windows.items()}
    missing = sum(
        int(counts[shard.split][shard.first_window : shard.first_window + shard.num_windows].sum())
        for shard in writer.missing_shards()
    )
    with Progress("dump-logits", total, "positions", total - missing) as progress:
        write_missing_shards(writer, teacher, windows, config, progress, ensemble=ensemble)
    return writer.finish()


def write_missing_shards(
    writer: CacheWriter,
    teacher: LanguageModel,
    windows: Mapping[SplitName, TokenWindows],
    config: DumpConfig,
    progress: Progress,
    num_workers: int | None = None,
    ensemble: Ensemble = ALONE,
) -> None:
    """Forward the teacher in worker threads; compress and write in this one, a few batches behind them.

    On a CPU each of `num_workers` (one per core if None) forwards batches of its own with one thread of torch: no
    barriers between cores, and bytes that do not depend on the number of cores. On an accelerator there is one worker.
    """
    device = teacher.head_weight.device
    on_cpu = device.type == "cpu"
    workers = (num_workers or torch.get_num_threads()) if on_cpu else 1
    spec = writer.spec
    tables = Tables(
        target=spec.target_part.own_tables(writer.tables),
        hidden=HiddenTransforms(spec.hidden, writer.tables, device) if spec.hidden else None,
    )

    def arrays_of(split: SplitName, rows: list[int]) -> dict[str, np.ndarray]:
        return window_arrays(teacher, windows[split], split, rows, spec, tables, config.precision, ensemble)

    with torch_threads(1 if on_cpu else torch.get_num_threads()) as set_threads:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="teacher", initializer=set_threads)
        try:
            in_flight: deque[tuple[ShardRange, Future[dict[str, np.ndarray]]]] = deque()
            todo = (
                (shard, rows) for shard in writer.missing_shards() for rows in batches_of(shard, config.batch_windows)
            )
            shard_writer: ShardWriter | None = None
            while True:
                for shard, rows in islice(todo, workers + _BATCHES_AHEAD - len(in_flight)):
                    in_flight.append((shard, pool.submit(arrays_of, shard.split, rows)))
                if not in_flight:
                    return
                shard, arrays = in_flight.popleft()
                shard_writer = shard_writer or writer.shard(shard)
                shard_writer.append(arrays.result())
                if shard_writer.is_full:
                    shard_writer.commit()
                    shard_writer = None
                found = arrays.result()
                progress.advance(int(found[MASK_NAME].sum()) if spec.is_masked else found["input_ids"][:, 1:].size)
        finally:
            pool.shutdown(cancel_futures=True)


def batches_of(shard: ShardRange, batch_windows: int) -> Iterator[list[int]]:
    """Window numbers of a shard, batch by batch; batches never cross shards, so that shards stand on their own."""
    end = shard.first_window + shard.num_windows
    for first in range(shard.first_window, end, batch_windows):
        yield list(range(first, min(first + batch_windows, end)))


@dataclass(frozen=True)
class Tables:
    """What the arrays of windows are made with: the profile's own tables, and the transforms of hidden states."""

    target: Mapping[str, np.ndarray]
    hidden: HiddenTransforms | None


def window_arrays(
    teacher: LanguageModel,
    windows: TokenWindows,
    split: SplitName,
    rows: list[int],
    spec: CacheSpec,
    tables: Tables,
    precision: str,
    ensemble: Ensemble = ALONE,
) -> dict[str, np.ndarray]:
    """Every array of the cache for these windows, by name, each (P, ...) of the stored type."""
    mask = windows.mask(rows)
    if mask is not None and not mask.any():
        given = {"input_ids": windows.read(rows), MASK_NAME: mask}
        absent = {array.name: np.zeros((len(rows), *array.shape), array.dtype) for array in spec.arrays}
        return absent | {name: values.astype(absent[name].dtype) for name, values in given.items()}
    wanted = [State(spec.hidden.output, layer) for layer in spec.hidden.layers] if spec.hidden else []
    positions, hidden, ids_PT1 = forward_windows(teacher, windows, split, rows, precision, wanted, ensemble)
    with torch.inference_mode():
        arrays = target_arrays(spec.profile, tables.target, positions)
        if spec.hidden is not None and tables.hidden is not None:
            input_ids_PT = torch.from_numpy(ids_PT1[:, :-1].astype(np.int64)).to(teacher.head_weight.device)
            found = hidden_arrays(spec.hidden, tables.hidden, hidden, input_ids_PT)
            arrays |= {name: values.cpu().numpy() for name, values in found.items()}
    arrays |= {"input_ids": ids_PT1} | ({} if mask is None else {MASK_NAME: mask})
    return {array.name: as_stored(arrays[array.name], array) for array in spec.arrays}
