"""One shard: HDF5 bytes made in memory, and the table of chunks of a shard on disk (docs/format.md, section 3).

The library makes the image of a file in memory, which goes to `atomic_file`: a full disk is an ordinary OSError and a
shard is never half there. It reads nothing: see cache/hdf5. Chunks are read with `os.pread`.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import zstandard

from tristill.cache.arrays import Dataset
from tristill.cache.errors import CacheCorruptError, CacheMismatchError
from tristill.cache.hashing import canonical_json
from tristill.cache.hdf5 import Hdf5Error, Hdf5File, StoredChunk
from tristill.cache.layout import ShardRange
from tristill.cache.parts import MASK_NAME
from tristill.cache.regular_file import IrregularFileError, open_regular
from tristill.cache.spec import CacheSpec, differences

ZSTANDARD_FILTER = 32015
SPEC_ATTRIBUTE = "tristill_spec"
SHARD_ATTRIBUTE = "tristill_shard"
_LARGEST_ATTRIBUTE_BYTES = 60_000
_ID_DATASETS = {"input_ids", "head_ids"}
_LIBRARY_BOUNDS = ("v110", "v110")
_HASH_BLOCK_BYTES = 2**20

Frames = Mapping[str, list[bytes]]


def shard_identity(shard: ShardRange) -> str:
    """The JSON of the attribute `tristill_shard`."""
    return canonical_json({"first_window": shard.first_window, "num_windows": shard.num_windows, "split": shard.split})


def shard_image(spec: CacheSpec, shard: ShardRange, frames: Frames, compression_level: int) -> bytes:
    """The bytes of a shard whose chunks are the given Zstandard frames, per dataset and in order."""
    with h5py.File(shard.name, "w", driver="core", backing_store=False, libver=_LIBRARY_BOUNDS) as file:
        file.attrs.create(SPEC_ATTRIBUTE, np.bytes_(spec.to_json().encode("ascii")))
        file.attrs.create(SHARD_ATTRIBUTE, np.bytes_(shard_identity(shard).encode("ascii")))
        for declared in spec.datasets:
            dataset = _create_dataset(file, spec, shard, declared, compression_level)
            rest = (0,) * len(declared.array.shape)
            for chunk, frame in enumerate(frames[declared.name]):
                dataset.write_direct_chunk((chunk * spec.rows_per_chunk(declared), *rest), frame)
        file.flush()
        image: bytes = file.id.get_file_image()
    return image


def _create_dataset(
    file: h5py.File, spec: CacheSpec, shard: ShardRange, dataset: Dataset, compression_level: int
) -> h5py.h5d.DatasetID:
    array = dataset.array
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((spec.rows_per_chunk(dataset), *array.shape))
    properties.set_filter(ZSTANDARD_FILTER, h5py.h5z.FLAG_OPTIONAL, (compression_level,))
    properties.set_obj_track_times(False)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # A shard may hold fewer windows than a chunk; HDF5 wants dimensions no smaller than the chunk, or room to grow.
    num_rows = _num_rows(spec, shard, dataset)
    shape = (num_rows, *array.shape)
    room = (max(num_rows, spec.rows_per_chunk(dataset)), *array.shape)
    space = h5py.h5s.create_simple(shape, room)
    return h5py.h5d.create(
        file.id, array.name.encode("ascii"), h5py.h5t.py_create(np.dtype(array.dtype)), space, properties
    )


def _num_rows(spec: CacheSpec, shard: ShardRange, dataset: Dataset) -> int:
    return shard.num_chunks(spec) if dataset.per_chunk else shard.num_windows


class OpenShard:
    """A checked shard, ready for reads from any thread. Holds a file descriptor and the chunk tables, no data."""

    def __init__(self, path: Path, spec: CacheSpec, shard: ShardRange) -> None:
        """Check everything of docs/format.md, section 9, that can be checked without decompressing."""
        self.path = path
        self._spec = spec
        self._datasets = {dataset.name: dataset for dataset in spec.datasets}
        self.descriptor = _open_shard(path)
        try:
            self.file_bytes = os.fstat(self.descriptor).st_size
            self._chunks = _read_chunk_tables(path, self.descriptor, self.file_bytes, spec, shard)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the file descriptor back."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        """A shard that the reader let go of closes when the last thread is done with it."""
        if hasattr(self, "descriptor"):
            self.close()

    @property
    def is_removed(self) -> bool:
        """Whether the file has no name any more; it can still be read."""
        return os.fstat(self.descriptor).st_nlink == 0

    def stored_bytes(self, name: str) -> int:
        """Bytes of a dataset's compressed chunks."""
        return sum(chunk.num_bytes for chunk in self._chunks[name])

    def read_chunk(self, name: str, chunk: int) -> np.ndarray:
        """The decompressed chunk, `(rows per chunk, ...)`, read-only; padding of a last chunk included."""
        return self._decompressed(name, chunk, self._read_frame(name, chunk))

    def verified_sha256(self) -> str:
        """SHA-256 of the whole file, read once; every chunk was decompressed and passed its checks."""
        digest, num_hashed = hashlib.sha256(), 0
        places = ((stored.offset, name, i) for name, table in self._chunks.items() for i, stored in enumerate(table))
        for offset, name, chunk in sorted(places):
            for block in self._blocks(num_hashed, offset):
                digest.update(block)
            frame = self._read_frame(name, chunk)
            self._decompressed(name, chunk, frame)
            digest.update(frame[max(0, num_hashed - offset) :])  # only a hostile file has chunks that overlap
            num_hashed = max(num_hashed, offset + len(frame))
        for block in self._blocks(num_hashed, self.file_bytes):
            digest.update(block)
        return digest.hexdigest()

    def _blocks(self, start: int, end: int) -> Iterator[bytes]:
        for offset in range(start, end, _HASH_BLOCK_BYTES):
            yield os.pread(self.descriptor, min(_HASH_BLOCK_BYTES, end - offset), offset)

    def _read_frame(self, name: str, chunk: int) -> bytes:
        stored = self._chunks[name][chunk]
        frame = os.pread(self.descriptor, stored.num_bytes, stored.offset)
        if len(frame) != stored.num_bytes:
            where = f"{self.path}: dataset {name}, chunk {chunk}"
            raise corrupt(where, f"found {len(frame)} bytes, expected {stored.num_bytes}: the file is truncated")
        return frame

    def _decompressed(self, name: str, chunk: int, frame: bytes) -> np.ndarray:
        array = self._datasets[name].array
        num_rows = self._spec.rows_per_chunk(self._datasets[name])
        expected_bytes = array.num_bytes * num_rows
        where = f"{self.path}: dataset {name}, chunk {chunk}"
        try:
            declared = zstandard.get_frame_parameters(frame)
            if declared.content_size != expected_bytes:
                raise corrupt(where, f"its frame declares {declared.content_size} bytes, expected {expected_bytes}")
            if not declared.has_checksum:
                raise corrupt(where, "its frame has no checksum")
            content = zstandard.ZstdDecompressor().decompress(
                frame, max_output_size=expected_bytes, allow_extra_data=False
            )
        except zstandard.ZstdError as exc:
            raise corrupt(where, f"its stored bytes are damaged ({exc})") from exc
        values = np.frombuffer(content, dtype=array.dtype).reshape(num_rows, *array.shape)
        if name == MASK_NAME and values.max() > 1:
            raise corrupt(where, f"holds {values.max()}, expected 1 for positions that count and 0 for others")
        if name in _ID_DATASETS and values.max() >= self._spec.vocab_size:
            raise corrupt(where, f"holds id {values.max()}, expected ids below {self._spec.vocab_size}")
        return values


def corrupt(where: str, what: str) -> CacheCorruptError:
    """The error for damage in one shard, with the way out."""
    return CacheCorruptError(
        f"{where}: {what}; run `tristill cache repair`, or delete this shard and run `tristill dump-logits` again: it "
        "writes only what is missing"
    )


def spec_of_shard(path: Path) -> CacheSpec:
    """The spec that a shard carries, itself checked; whether the shard keeps to it is not known yet."""
    descriptor = _open_shard(path)
    try:
        with _metadata(path, descriptor, os.fstat(descriptor).st_size) as file:
            return CacheSpec.from_json(_read_attribute(file, SPEC_ATTRIBUTE, path), str(path))
    finally:
        os.close(descriptor)


def _open_shard(path: Path) -> int:
    try:
        return open_regular(path)
    except FileNotFoundError as exc:
        raise corrupt(str(path), "the shard is missing") from exc
    except IrregularFileError as exc:
        raise corrupt(str(path), str(exc)) from exc


def _read_chunk_tables(
    path: Path, descriptor: int, file_bytes: int, spec: CacheSpec, shard: ShardRange
) -> dict[str, list[StoredChunk]]:
    with _metadata(path, descriptor, file_bytes) as file:
        found = CacheSpec.from_json(_read_attribute(file, SPEC_ATTRIBUTE, path), str(path))
        if found != spec:
            raise CacheMismatchError(
                f"{path}: the shard belongs to another cache: {differences(found, spec)}; point cache.dir "
                "elsewhere, or run `tristill dump-logits --force` to replace that cache"
            )
        identity = _read_attribute(file, SHARD_ATTRIBUTE, path)
        if identity != shard_identity(shard):
            raise corrupt(str(path), f"it says it holds {identity}, expected {shard_identity(shard)}")
    return {item.name: _chunk_table(file, path, spec, shard, item) for item in spec.datasets}


@contextmanager
def _metadata(path: Path, descriptor: int, file_bytes: int) -> Iterator[Hdf5File]:
    """What an open file's metadata says; whatever is wrong with it is damage."""
    try:
        yield Hdf5File(lambda offset, size: os.pread(descriptor, size, offset), file_bytes)
    except Hdf5Error as exc:
        raise corrupt(str(path), f"is damaged or no HDF5 file of this format ({exc})") from exc


def _read_attribute(file: Hdf5File, name: str, path: Path) -> str:
    text = file.text(name)
    if text is None:
        raise corrupt(str(path), f"has no attribute {name}")
    if len(text) > _LARGEST_ATTRIBUTE_BYTES or not text.isascii():
        raise corrupt(str(path), f"attribute {name} is not a fixed-length string of moderate size")
    return text.decode("ascii")


def _most_frame_bytes(content_bytes: int) -> int:
    """What Zstandard takes at most for so many bytes (ZSTD_compressBound), and some for its header and checksum."""
    return content_bytes + content_bytes // 128 + 1024


def _chunk_table(
    file: Hdf5File, path: Path, spec: CacheSpec, shard: ShardRange, declared: Dataset
) -> list[StoredChunk]:
    array, rows_per_chunk = declared.array, spec.rows_per_chunk(declared)
    where = f"{path}: dataset {array.name}"
    try:
        dataset = file.dataset(array.name)
        if dataset is None:
            raise corrupt(where, "is missing or is a link")
        found = (dataset.dtype, dataset.shape, dataset.chunks)
        expected = (array.dtype, (_num_rows(spec, shard, declared), *array.shape), (rows_per_chunk, *array.shape))
        if found != expected:
            raise corrupt(where, f"has type, shape and chunks {found}, expected {expected}")
        if dataset.filters != (ZSTANDARD_FILTER,):
            raise corrupt(where, f"has filters {[*dataset.filters]}, expected [{ZSTANDARD_FILTER}]")
        chunks = dataset.chunk_table(shard.num_chunks(spec))
    except Hdf5Error as exc:
        raise corrupt(where, str(exc)) from exc
    most_bytes = _most_frame_bytes(array.num_bytes * rows_per_chunk)
    if (largest := max(chunk.num_bytes for chunk in chunks)) > most_bytes:
        raise corrupt(where, f"has a stored chunk of {largest} bytes, expected at most {most_bytes}")
    return chunks
