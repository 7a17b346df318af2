"""Streams windows through the teacher and writes the cache; a writer thread compresses while the teacher computes."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache import CacheSpec, CacheWriter, HiddenSpec, SplitName, SplitSpec
from cache.layout import ShardRange, default_windows_per_chunk
from cache.manifest import Manifest
from stages.data.tokenize import TokenizedCorpus, load_corpus, split_windows
from stages.dump.config import DumpConfig
from stages.dump.topk import topk_target
from stages.errors import CheckpointError
from stages.losses.chunked_head import chunks
from stages.models.folder import load_model, model_fingerprint, pick_device
from stages.models.transformer import Transformer
from stages.progress import Progress

_BATCHES_IN_FLIGHT = 4


def dump_logits(config: DumpConfig, data_folder: Path, teacher_folder: Path, folder: Path) -> Manifest:
    """Write the cache, or what is missing of it; its manifest.

    Every shard is dumped on its own, so its bytes do not depend on what was there before.
    """
    device = pick_device(config.device)
    teacher = load_model(teacher_folder).to(device).eval()
    corpus = load_corpus(data_folder)
    spec = cache_spec(config, corpus, teacher, model_fingerprint(teacher_folder))
    writer = CacheWriter(folder, spec, (data_folder / "tokenizer.json").read_bytes(), config.compression_level)
    windows = {split: split_windows(data_folder, split) for split in spec.splits}
    missing = writer.missing_shards()
    total = sum(spec.num_positions(split) for split in spec.splits)
    done = total - sum(shard.num_windows for shard in missing) * spec.context_length
    with (
        Progress("dump-logits", total, "positions", done) as progress,
        ThreadPoolExecutor(1, thread_name_prefix="cache-write") as pool,
    ):
        in_flight: deque[Future[None]] = deque()
        try:
            for shard in missing:
                shard_writer = writer.shard(shard)
                for rows in batches_of(shard, config.batch_windows):
                    arrays = teacher_arrays(teacher, windows[shard.split].read(rows), spec, config.precision)
                    in_flight.append(pool.submit(shard_writer.append, arrays))
                    if len(in_flight) > _BATCHES_IN_FLIGHT:
                        in_flight.popleft().result()
                    progress.advance(len(rows) * spec.context_length)
                in_flight.append(pool.submit(shard_writer.commit))
            for write in in_flight:
                write.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return writer.finish()


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

    return CacheSpec(
        vocab_size=corpus.vocab_size,
        end_of_text_id=corpus.end_of_text_id,
        context_length=corpus.context_length,
        profile=config.profile,
        hidden=HiddenSpec(layers=config.hidden_layers, width=teacher.config.width) if config.hidden_layers else None,
        splits={"train": split_spec("train", config.max_train_windows), "validation": split_spec("validation", None)},
        windows_per_chunk=per_chunk,
        windows_per_shard=chunks_per_shard * per_chunk,
        teacher_fingerprint=teacher_fingerprint,
        tokenizer_fingerprint=corpus.tokenizer_sha256,
    )


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
    arrays = {array.name: stored[array.name].cpu().numpy() for array in spec.arrays if array.name in stored}
    return {"input_ids": ids_BT1} | {name: _as_stored(array, spec, name) for name, array in arrays.items()}


def _as_stored(array: np.ndarray, spec: CacheSpec, name: str) -> np.ndarray:
    dtype = next(np.dtype(declared.dtype) for declared in spec.arrays if declared.name == name)
    if dtype == np.float16:
        largest = float(np.finfo(np.float16).max)
        array = array.clip(-largest, largest)
    return array.astype(dtype)
