"""The same windows as two streaming libraries carry them: written by their writers, read by their readers.

Neither is an extra of the project: mosaicml-streaming wants versions that ours exclude, of which reading local files
uses nothing. `pip install --no-deps -r benchmarks/peers.txt` is enough. They are imported as they are but for
mosaicml's `streaming.vision`, which wants torchvision and is left out.
"""

import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tristill.cache import Cache, WindowBatch

Window = dict[str, np.ndarray]
_LEVEL = 3
_SHARD_BYTES = 2**26


class PeerReader(Protocol):
    """Reads what was written into its folder; `forget` has it decompress again next time."""

    def batches(self, batch_windows: int) -> Iterator[Window]:
        """All windows, in the order in which they lie in the files."""
        ...

    def forget(self) -> None:
        """Remove what was decompressed."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Of the files as written."""
        ...


def windows_of(cache: Cache, layers: tuple[int, ...]) -> Iterator[Window]:
    """The decoded arrays of all training windows, as the cache's own reader gives them."""
    for batch in cache.stream("train", 1, seed=None, hidden_layers=layers):
        arrays = {"input_ids": batch.input_ids, **batch.target, **batch.signals}
        arrays |= {f"hidden_{layer}": array for layer, array in batch.hidden.items()}
        arrays |= {f"hidden_{layer}_scale": array for layer, array in batch.hidden_scale.items()}
        yield {name: array[0] for name, array in arrays.items()}


def _stacked(samples: Iterator[dict[str, Any]], batch_windows: int) -> Iterator[Window]:
    rows = []
    for sample in samples:
        rows.append(sample)
        if len(rows) == batch_windows:
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            rows = []


def window_batch(cache: Cache, arrays: Window, layers: tuple[int, ...]) -> WindowBatch:
    """What the cache's own reader would give."""
    return WindowBatch(
        arrays["input_ids"],
        {array.name: arrays[array.name] for array in cache.spec.target_part.arrays},
        {name: arrays[name] for name in ("teacher_entropy", "label_log_prob")},
        {layer: arrays[f"hidden_{layer}"] for layer in layers},
        {layer: arrays[name] for layer in layers if (name := f"hidden_{layer}_scale") in arrays},
    )


class Mosaic:
    """mosaicml-streaming: MDS shards, each one Zstandard frame, decompressed into files beside them."""

    def __init__(self, folder: Path, windows: Iterator[Window]) -> None:
        sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
        from streaming import MDSWriter

        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        first = next(windows)
        columns = {
            name: f"ndarray:{array.dtype}:{','.join(str(size) for size in array.shape)}"
            for name, array in first.items()
        }
        with MDSWriter(
            out=str(folder), columns=columns, compression=f"zstd:{_LEVEL}", size_limit=_SHARD_BYTES
        ) as writer:
            writer.write(first)
            for window in windows:
                writer.write(window)

    @property
    def stored_bytes(self) -> int:
        """See PeerReader."""
        return sum(path.stat().st_size for path in self._folder.glob("*.zstd"))

    def forget(self) -> None:
        """See PeerReader."""
        for path in self._folder.glob("*.mds"):
            path.unlink()

    def batches(self, batch_windows: int) -> Iterator[Window]:
        """See PeerReader."""
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        yield from _stacked(StreamingDataset(local=str(self._folder), batch_size=batch_windows), batch_windows)


class Litdata:
    """litdata: chunks of Zstandard frames of a few samples each, its default, decompressed in memory."""

    def __init__(self, folder: Path, windows: Iterator[Window]) -> None:
        from litdata.streaming.writer import BinaryWriter

        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        writer = BinaryWriter(str(folder), chunk_bytes=_SHARD_BYTES, compression=f"zstd:{_LEVEL}")
        for index, window in enumerate(windows):
            writer[index] = window
        writer.done()
        writer.merge()

    @property
    def stored_bytes(self) -> int:
        """See PeerReader."""
        return sum(path.stat().st_size for path in self._folder.glob("*.bin"))

    def forget(self) -> None:
        """Nothing is kept decompressed."""

    def batches(self, batch_windows: int) -> Iterator[Window]:
        """See PeerReader."""
        from litdata import StreamingDataset

        yield from _stacked(iter(StreamingDataset(input_dir=str(self._folder))), batch_windows)
