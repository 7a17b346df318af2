"""Streams windows through the teacher and writes the cache; compression overlaps the teacher's forward pass."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from tristill.cache import CacheSpec, CacheWriter, SplitName
from tristill.cache.hashing import sha256_of_file
from tristill.cache.layout import TOKENIZER_NAME, ShardRange, shard_ranges
from tristill.cache.manifest import ShardRecord
from tristill.cache.parts import MASK_NAME
from tristill.cache.remote import remote_copy
from tristill.cache.writer import ShardWriter, found_shards
from tristill.stages.data.tokenized import TokenizedCorpus, corpus_of_model, split_windows
from tristill.stages.data.tokens import TokenWindows
from tristill.stages.dump.calibrate import as_stored
from tristill.stages.dump.config import DumpConfig
from tristill.stages.dump.ensemble import ALONE, Ensemble, load_ensemble
from tristill.stages.dump.extract import target_arrays
from tristill.stages.dump.forward import forward_windows
from tristill.stages.dump.hidden import hidden_arrays
from tristill.stages.dump.prepare import prepare
from tristill.stages.dump.progress import shown_progress
from tristill.stages.errors import CheckpointError
from tristill.stages.models.checkpoint import load_model, pick_device
from tristill.stages.models.companions import companions
from tristill.stages.models.language_model import LanguageModel, State
from tristill.stages.models.origin import model_fingerprint
from tristill.stages.progress import say, waiting
from tristill.stages.ranks import Ranks, current_ranks
from tristill.stages.targets.hidden import HiddenTransforms
from tristill.stages.threads import torch_threads
from tristill.stages.training.start_line import say_start

_BATCHES_AHEAD = 2


def dump_logits(config: DumpConfig, data_folder: Path, teacher_folder: Path, folder: Path) -> str:
    """Write the cache, or what is missing of it; its fingerprint.

    Every shard is dumped on its own, so its bytes do not depend on what was there before, nor on who dumps it: of many
    ranks, which all see the folder, each takes a share of the missing shards. The first one prepares what all need, and
    writes the manifest; in between nobody waits for anybody. What a lost rank has finished is kept.
    """
    ranks = current_ranks()
    with ranks.agreeing():
        given = _load(config, data_folder, teacher_folder)
    size = sum(parameter.numel() for parameter in given.teacher.parameters())
    dtype = str(given.teacher.head_weight.dtype).removeprefix("torch.")
    precision = config.precision if config.precision != "float32" else dtype
    say_start("dump-logits", f"a teacher of {size:,} parameters", given.teacher.head_weight.device, precision, ranks)
    with ranks.agreeing():
        prepared = None
        if ranks.is_first:
            if copy := remote_copy(folder):
                copy.bring_begun()
            fingerprint = config.teacher_fingerprint(model_fingerprint(teacher_folder))
            assert fingerprint is not None, "all teachers were just loaded"
            prepared = prepare(config, given.corpus, given.teacher, fingerprint, given.windows, folder, given.ensemble)
    spec = CacheSpec.model_validate_json(ranks.from_first(prepared and prepared.spec.to_json()))
    sizes_text = ", ".join(f"{spec.num_positions(split):,} of {split}" for split in spec.splits)
    say(f"dump-logits: positions: {sizes_text}; windows of {spec.context_length:,}")
    with ranks.agreeing(), _said(ranks, "looking at shards that are there"):
        found = found_shards(folder, spec, ranks.share_of(list(shard_ranges(spec))))
    records = _of_all(ranks, found)
    writer: CacheWriter | None = None
    with ranks.agreeing():  # tables are there before others read them
        if prepared is not None:
            writer = CacheWriter(
                folder,
                spec,
                (data_folder / TOKENIZER_NAME).read_bytes(),
                prepared.tables_image,
                config.compression_level,
                records,
                companions(teacher_folder),
            )
    with ranks.agreeing():
        writer = writer or CacheWriter(folder, spec, None, None, config.compression_level, records)
    own = ranks.share_of(writer.missing_shards())
    sizes = _positions(writer.missing_shards(), given.windows)
    others = {name: sizes[name] for name in sizes.keys() - {shard.name for shard in own}}
    total = sum(spec.num_positions(split) for split in spec.splits)
    with shown_progress(ranks, folder, total, sum(sizes.values()), others) as advance:
        write_shards(writer, own, given.teacher, given.windows, config, advance, ensemble=given.ensemble)
        writer.settle()
        records = _of_all(ranks, writer.records(own))
    finished = ""
    with ranks.agreeing():
        if ranks.is_first:
            writer.take(records)
            finished = writer.finish().fingerprint
    return str(ranks.from_first(finished))


@dataclass(frozen=True)
class _Given:
    """What a dump reads. windows: of every split."""

    corpus: TokenizedCorpus
    windows: Mapping[SplitName, TokenWindows]
    teacher: LanguageModel
    ensemble: Ensemble


def _load(config: DumpConfig, data_folder: Path, teacher_folder: Path) -> _Given:
    device = pick_device(config.device)
    teacher = load_model(teacher_folder).to(device).eval()
    corpus = corpus_of_model(data_folder, teacher.vocab_size, str(teacher_folder))
    if sha256_of_file(teacher_folder / TOKENIZER_NAME) != corpus.tokenizer_sha256:
        raise CheckpointError(
            f"{teacher_folder}: the teacher was trained with another tokenizer than that of {data_folder}; run "
            "`tristill teacher --force`"
        )
    windows = {split: split_windows(data_folder, split) for split in corpus.splits}
    return _Given(corpus, windows, teacher, load_ensemble(config, data_folder, corpus, device))


def _said(ranks: Ranks, label: str) -> AbstractContextManager[None]:
    return waiting(label) if ranks.is_first else nullcontext()


def _positions(shards: Sequence[ShardRange], windows: Mapping[SplitName, TokenWindows]) -> dict[str, int]:
    """Those that count of each shard, by its name."""
    counts = {split: found.counts() for split, found in windows.items()}
    ends = {shard.name: shard.first_window + shard.num_windows for shard in shards}
    return {shard.name: int(counts[shard.split][shard.first_window : ends[shard.name]].sum()) for shard in shards}


def _of_all(ranks: Ranks, records: Sequence[ShardRecord]) -> list[ShardRecord]:
    """Those that any rank has."""
    told = ranks.gathered([record.model_dump(mode="json") for record in records])
    return [ShardRecord.model_validate(record) for of_rank in told for record in of_rank]


def write_shards(
    writer: CacheWriter,
    shards: Sequence[ShardRange],
    teacher: LanguageModel,
    windows: Mapping[SplitName, TokenWindows],
    config: DumpConfig,
    advance: Callable[[int], object],
    num_workers: int | None = None,
    ensemble: Ensemble = ALONE,
) -> None:
    """Forward the teacher in worker threads; compress and write in this one, a few batches behind them.

    On a CPU each of `num_workers` (one per thread that torch takes, if None) forwards batches of its own with one
    thread of torch: no barriers between cores, and bytes that do not depend on the number of cores. On an accelerator
    there is one worker. `advance` is told how many positions were done.
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

        def begin() -> None:
            set_threads()
            if device.type == "cuda":  # each thread has a current device of its own
                torch.cuda.set_device(device)

        pool = ThreadPoolExecutor(workers, thread_name_prefix="teacher", initializer=begin)
        try:
            in_flight: deque[tuple[ShardRange, Future[dict[str, np.ndarray]]]] = deque()
            todo = ((shard, rows) for shard in shards for rows in batches_of(shard, config.batch_windows))
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
                advance(int(found[MASK_NAME].sum()) if spec.is_masked else found["input_ids"][:, 1:].size)
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
