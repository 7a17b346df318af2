"""Streams windows through the teacher and writes the cache; compression overlaps the teacher's forward pass."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from cache import CacheSpec, CacheWriter, HiddenSpec, SplitName, SplitSpec
from cache.hashing import sha256_of_file
from cache.layout import TOKENIZER_NAME, ShardRange, default_windows_per_chunk
from cache.manifest import Manifest
from cache.spec import describe
from cache.writer import ShardWriter
from stages.data.tokenized import TokenizedCorpus, load_corpus, split_windows
from stages.data.tokens import TokenWindows
from stages.dump.config import DumpConfig
from stages.dump.topk import topk_target
from stages.errors import CheckpointError
from stages.losses.chunked_head import chunks
from stages.models.folder import load_model, model_fingerprint, pick_device
from stages.models.transformer import Transformer
from stages.progress import Progress

_BATCHES_AHEAD = 2


def dump_logits(config: DumpConfig, data_folder: Path, teacher_folder: Path, folder: Path) -> Manifest:
    """Write the cache, or what is missing of it; its manifest.

    Every shard is dumped on its own, so its bytes do not depend on what was there before.
    """
    device = pick_device(config.device)
    teacher = load_model(teacher_folder).to(device).eval()
    corpus = load_corpus(data_folder)
    if sha256_of_file(teacher_folder / TOKENIZER_NAME) != corpus.tokenizer_sha256:
        raise CheckpointError(
            f"{teacher_folder}: the teacher was trained with another tokenizer than that of {data_folder}; run "
            "`tristill teacher --force`"
        )
    spec = cache_spec(config, corpus, teacher, model_fingerprint(teacher_folder))
    writer = CacheWriter(folder, spec, (data_folder / "tokenizer.json").read_bytes(), config.compression_level)
    windows = {split: split_windows(data_folder, split) for split in spec.splits}
    total = sum(spec.num_positions(split) for split in spec.splits)
    missing = sum(shard.num_windows for shard in writer.missing_shards()) * spec.context_length
    with Progress("dump-logits", total, "positions", total - missing) as progress:
        write_missing_shards(writer, teacher, windows, config, progress)
    return writer.finish()


def write_missing_shards(
    writer: CacheWriter,
    teacher: Transformer,
    windows: Mapping[SplitName, TokenWindows],
    config: DumpConfig,
    progress: Progress,
    num_workers: int | None = None,
) -> None:
    """Forward the teacher in worker threads; compress and write in this one, a few batches behind them.

    On a CPU each of `num_workers` (one per core if None) forwards batches of its own with one thread of torch: no
    barriers between cores, and bytes that do not depend on the number of cores. On an accelerator there is one worker.
    """
    on_cpu = teacher.head_weight.device.type == "cpu"
    workers = (num_workers or torch.get_num_threads()) if on_cpu else 1
    spec = writer.spec

    def arrays_of(split: SplitName, rows: list[int]) -> dict[str, np.ndarray]:
        return teacher_arrays(teacher, windows[split].read(rows), spec, config.precision)

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
                progress.advance(len(arrays.result()["input_ids"]) * spec.context_length)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def torch_threads(num_threads: int) -> Iterator[Callable[[], None]]:
    """Give this thread `num_threads` threads of torch per operator, and every thread that calls what is yielded."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield lambda: torch.set_num_threads(num_threads)
    finally:
        torch.set_num_threads(before)


def cache_spec(
    config: DumpConfig, corpus: TokenizedCorpus, teacher: Transformer, teacher_fingerprint: str
) -> CacheSpec:
    """What the cache will declare. Raises CheckpointError if teacher and corpus do not belong together."""
    if teacher.vocab_size != corpus.vocab_size:
        raise CheckpointError(
            f"the teacher has {teacher.vocab_size} output entries, but the tokenizer of the corpus has "
            f"{corpus.vocab_size}; train the teacher on this corpus"
        )
    if beyond := [layer for layer in config.hidden_layers if layer > teacher.config.layers]:
        raise CheckpointError(
            f"cache.hidden_layers: found {beyond}, but the teacher has {teacher.config.layers} blocks"
        )
    per_chunk = default_windows_per_chunk(corpus.context_length)
    chunks_per_shard = max(1, round(config.shard_positions / (per_chunk * corpus.context_length)))

    def split_spec(split: SplitName, max_windows: int | None) -> SplitSpec:
        all_windows = (corpus.splits[split].tokens - 1) // corpus.context_length
        num_windows = min(all_windows, max_windows or all_windows)
        return SplitSpec(
            num_windows=num_windows,
            bytes_per_token=corpus.splits[split].bytes_per_token,
            fingerprint=corpus.windows_fingerprint(split, num_windows),
        )

    try:
        return CacheSpec(
            vocab_size=corpus.vocab_size,
            end_of_text_id=corpus.end_of_text_id,
            context_length=corpus.context_length,
            profile=config.profile,
            hidden=HiddenSpec(layers=config.hidden_layers, width=teacher.config.width)
            if config.hidden_layers
            else None,
            splits={
                "train": split_spec("train", config.max_train_windows),
                "validation": split_spec("validation", None),
            },
            windows_per_chunk=per_chunk,
            windows_per_shard=chunks_per_shard * per_chunk,
            teacher_fingerprint=teacher_fingerprint,
            tokenizer_fingerprint=corpus.tokenizer_sha256,
        )
    except ValidationError as exc:
        raise CheckpointError(f"the cache cannot hold that:\n{describe(exc)}") from exc


def batches_of(shard: ShardRange, batch_windows: int) -> Iterator[list[int]]:
    """Window numbers of a shard, batch by batch; batches never cross shards, so that shards stand on their own."""
    end = shard.first_window + shard.num_windows
    for first in range(shard.first_window, end, batch_windows):
        yield list(range(first, min(first + batch_windows, end)))


@torch.inference_mode()
def teacher_arrays(teacher: Transformer, ids_BT1: np.ndarray, spec: CacheSpec, precision: str) -> dict[str, np.ndarray]:
    """Every dataset of the cache for these windows, by name, each (B, ...) of the stored type."""
    device = teacher.head_weight.device
    layers = spec.hidden.layers if spec.hidden else ()
    input_ids_BT = torch.from_numpy(ids_BT1[:, :-1].astype(np.int64)).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        features = teacher(input_ids_BT, layers)
        final_ND = features.final_BTD.flatten(0, 1)
        parts = [
            topk_target((final_ND[rows] @ teacher.head_weight.T).float(), spec.profile.top_k, spec.profile.temperature)
            for rows in chunks(len(final_ND), teacher.vocab_size)
        ]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    stored: dict[str, Tensor] = {
        name: tensor.view(*input_ids_BT.shape, *tensor.shape[1:]) for name, tensor in tensors.items()
    }
    stored |= {f"hidden_{layer}": features.hidden[layer] for layer in layers}
    if not torch.isfinite(stored["head_logits"]).all():
        raise CheckpointError("the teacher's logits are not finite; train it again with a lower learning rate")
    stored |= {"input_ids": torch.from_numpy(ids_BT1)}
    return {array.name: as_stored(stored[array.name].cpu().numpy(), array.dtype) for array in spec.arrays}


def as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """`values` in a stored type; float16 saturates instead of overflowing."""
    if dtype == "<f2":
        largest = float(np.finfo(np.float16).max)
        values = values.clip(-largest, largest)
    return values.astype(dtype)
