"""Writes a cache shard by shard; each shard is committed on its own, the manifest last."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import numpy as np
import zstandard

from tristill.cache.atomic import write_atomically
from tristill.cache.errors import CacheCorruptError, CacheRequestError, CacheWriteError
from tristill.cache.layout import MANIFEST_NAME, TABLES_NAME, TOKENIZER_NAME, CompanionName, ShardRange, shard_ranges
from tristill.cache.locks import lock
from tristill.cache.manifest import Manifest, ShardRecord, refuse_too_many_shards, save_manifest
from tristill.cache.parts import MASK_NAME, PartCoder, part_coders
from tristill.cache.profiles.profile import Place
from tristill.cache.remote import remote_copy
from tristill.cache.shard import OpenShard, shard_image
from tristill.cache.spec import CacheSpec
from tristill.cache.tables import load_tables, stored_calibration

_OF_ALL_POSITIONS = {"windows", MASK_NAME}


class CacheWriter:
    """One dump. Shards found on disk are verified and kept, so a killed dump goes on where it was.

    One process at a time may write a folder, or several that write different shards: one of them writes tokenizer and
    tables before the others open theirs, takes their records in the end and finishes. The caller sees to that.
    """

    def __init__(
        self,
        folder: Path,
        spec: CacheSpec,
        tokenizer_json: bytes | None,
        tables_image: bytes | None = None,
        compression_level: int = 3,
        found: Iterable[ShardRecord] | None = None,
        companions: Mapping[CompanionName, bytes] = MappingProxyType({}),
    ) -> None:
        """Prepare `folder`. Raises CacheMismatchError, before anything is written, if it holds another cache.

        Likewise CacheRequestError, if the spec has more shards than a manifest has room for.

        `tables_image` are the bytes of `tables.h5`, for a spec that has tables; without it, and without
        `tokenizer_json`, these files are there already. `found` are the shards on disk where they were verified
        before; without it all are verified here. `companions` are the files that go with the tokenizer, of whoever
        finishes.
        """
        refuse_too_many_shards(spec)
        self.folder = folder
        self.spec = spec
        self._compression_level = compression_level
        self._companions = {name: hashlib.sha256(content).hexdigest() for name, content in companions.items()}
        folder.mkdir(parents=True, exist_ok=True)
        copy = remote_copy(folder)
        self._uploads = copy.uploads(spec) if copy else None
        self._records: dict[str, ShardRecord] = dict(self._uploads.records) if self._uploads else {}
        here = found_shards(folder, spec, self.missing_shards()) if found is None else found
        new = [record for record in here if record.name not in self._records]
        self.take(new)
        if copy:
            copy.claim()
        given = {TOKENIZER_NAME: tokenizer_json, TABLES_NAME: tables_image}
        once = {name: content for name, content in given.items() if content is not None} | dict(companions)
        for name, content in once.items():
            self._write(folder / name, content)
        if self._uploads and once:
            self._uploads.put_first(once)
            for record in new:
                self._uploads.put(record)
        self.tables = load_tables(folder, spec)
        self._coders = part_coders(spec, self.tables)

    def take(self, records: Iterable[ShardRecord]) -> None:
        """Shards that are on disk, verified or written by whom the caller trusts: they are not missing any more."""
        self._records |= {record.name: record for record in records}

    def records(self, shards: Iterable[ShardRange]) -> list[ShardRecord]:
        """Those of shards that are written."""
        return [self._records[shard.name] for shard in shards]

    def missing_shards(self) -> list[ShardRange]:
        """Shards still to be written; the others were found on disk and verified, or written since."""
        return [shard for shard in shard_ranges(self.spec) if shard.name not in self._records]

    def shard(self, shard: ShardRange) -> "ShardWriter":
        """A writer for the windows of one shard."""
        return ShardWriter(self, shard)

    def settle(self) -> None:
        """Return when all shards that were written here have arrived at the URL, if the folder is a copy."""
        if self._uploads:
            self._uploads.wait()

    def finish(self) -> Manifest:
        """Write the manifest. Raises CacheRequestError while shards are missing."""
        if missing := self.missing_shards():
            names = ", ".join(shard.name for shard in missing[:5])
            raise CacheRequestError(f"{self.folder}: {len(missing)} shards are not written yet: {names}")
        records = tuple(self._records[shard.name] for shard in shard_ranges(self.spec))
        manifest = Manifest(
            spec=self.spec,
            shards=records,
            calibration=stored_calibration(self.folder, self.spec),
            companions=self._companions,
        )
        if self._uploads:
            self._uploads.commit(manifest)
        try:
            save_manifest(self.folder, manifest)
        except OSError as exc:
            raise self._refused(self.folder / MANIFEST_NAME, exc) from exc
        return manifest

    def commit(self, shard: ShardRange, frames: Mapping[str, list[bytes]]) -> None:
        """Put a finished shard on disk."""
        image = shard_image(self.spec, shard, frames, self._compression_level)
        if self._uploads:
            # Held as by a fetch: else another rank that makes room takes what is being written for what a kill left.
            with lock(self.folder, shard.name):
                self._uploads.make_room(shard.name, len(image))
                self._write(self.folder / shard.name, image)
        else:
            self._write(self.folder / shard.name, image)
        stored_bytes = {name: sum(map(len, parts)) for name, parts in frames.items()}
        record = _record(shard, len(image), hashlib.sha256(image).hexdigest(), stored_bytes)
        self._records[shard.name] = record
        if self._uploads:
            self._uploads.put(record)

    def coder(self, part: str) -> PartCoder:
        """The coder of a coded part."""
        return self._coders[part]

    def compressor(self) -> zstandard.ZstdCompressor:
        """The compressor of every frame: content size and checksum are written."""
        return zstandard.ZstdCompressor(self._compression_level, write_checksum=True, write_content_size=True)

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_atomically(path, content)
        except OSError as exc:
            raise self._refused(path, exc) from exc

    def _refused(self, path: Path, exc: OSError) -> CacheWriteError:
        return CacheWriteError(
            f"{path}: could not be written ({exc.strerror or exc}); {len(self._records)} finished shards are safe: "
            "free some space or fix the permissions and run the same command again"
        )


class ShardWriter:
    """Collects windows of one shard, compresses whole chunks as they fill, and commits at the end."""

    def __init__(self, writer: CacheWriter, shard: ShardRange) -> None:
        self._writer = writer
        self._shard = shard
        self._arrays = {array.name: array for array in writer.spec.arrays}
        self._frames: dict[str, list[bytes]] = {dataset.name: [] for dataset in writer.spec.datasets}
        self._compressor = writer.compressor()
        self._buffers = {
            array.name: np.zeros((writer.spec.windows_per_chunk, *array.shape), array.dtype)
            for array in writer.spec.arrays
        }
        self._num_buffered = 0
        self._num_windows = 0
        self._first_in_chunk = shard.first_window

    def append(self, windows: Mapping[str, np.ndarray]) -> None:
        """Add windows: one array per dataset, each `(n, ...)` of the spec's shape, type and any n.

        What they hold at positions that do not count is not kept.
        """
        if windows.keys() != self._arrays.keys():
            raise CacheRequestError(f"found datasets {sorted(windows)}, expected {sorted(self._arrays)}")
        num_new = len(windows["input_ids"])
        for name, array in self._arrays.items():
            found, expected = windows[name].shape, (num_new, *array.shape)
            if found != expected:
                raise CacheRequestError(f"dataset {name}: found shape {found}, expected {expected}")
        if self._num_windows + num_new > self._shard.num_windows:
            raise CacheRequestError(f"{self._shard.name}: more than its {self._shard.num_windows} windows")
        if self._writer.spec.is_masked and (windows[MASK_NAME] > 1).any():
            raise CacheRequestError(f"dataset {MASK_NAME}: expected 1 for positions that count and 0 for others")
        taken = 0
        while taken < num_new:
            room = self._writer.spec.windows_per_chunk - self._num_buffered
            part = slice(taken, taken + min(room, num_new - taken))
            count = part.stop - part.start
            for name, buffer in self._buffers.items():
                buffer[self._num_buffered : self._num_buffered + count] = windows[name][part]
            self._num_buffered += count
            taken += count
            if count == room:
                self._flush_chunk()
        self._num_windows += num_new

    @property
    def is_full(self) -> bool:
        """Whether all windows of the shard were appended."""
        return self._num_windows == self._shard.num_windows

    def commit(self) -> None:
        """Put the shard on disk. Raises CacheRequestError when windows are missing."""
        if not self.is_full:
            raise CacheRequestError(
                f"{self._shard.name}: found {self._num_windows} windows, expected {self._shard.num_windows}"
            )
        if self._num_buffered:
            self._flush_chunk()
        self._writer.commit(self._shard, self._frames)

    def _flush_chunk(self) -> None:
        spec = self._writer.spec
        for buffer in self._buffers.values():
            buffer[self._num_buffered :] = 0
        counts = self._buffers[MASK_NAME][: self._num_buffered] != 0 if spec.is_masked else None
        place = Place(self._shard.split, self._first_in_chunk, self._num_buffered, spec.context_length, counts)
        for part in spec.parts:
            if not part.is_coded:
                for array in part.arrays:
                    if counts is not None and part.name not in _OF_ALL_POSITIONS:
                        self._buffers[array.name][: self._num_buffered][~counts[:, :: part.stride]] = 0
                    self._frames[array.name].append(self._compressor.compress(self._buffers[array.name].data.cast("B")))
                continue
            given = {array.name: self._buffers[array.name][: self._num_buffered] for array in part.arrays}
            payload = self._writer.coder(part.name).encode(given, place)
            (dataset,) = spec.datasets_of(part)
            assert len(payload) <= dataset.array.num_bytes, "the capacity of a coded chunk bounds every payload"
            self._frames[part.name].append(self._compressor.compress(payload.ljust(dataset.array.num_bytes, b"\0")))
        self._first_in_chunk += self._num_buffered
        self._num_buffered = 0


def found_shards(folder: Path, spec: CacheSpec, shards: Iterable[ShardRange]) -> list[ShardRecord]:
    """The records of those shards that are in the folder and whole.

    Damaged ones count as missing, and are replaced when their windows are written again. Raises CacheMismatchError if
    one is of another cache.
    """
    records = []
    for shard in shards:
        if os.path.lexists(folder / shard.name):
            with suppress(CacheCorruptError):
                records.append(verified_record(folder / shard.name, spec, shard))
    return records


def verified_record(path: Path, spec: CacheSpec, shard: ShardRange) -> ShardRecord:
    """The record of a shard whose every frame was decompressed and passed its checksum."""
    opened = OpenShard(path, spec, shard)
    try:
        sha256 = opened.verified_sha256()
        stored_bytes = {dataset.name: opened.stored_bytes(dataset.name) for dataset in spec.datasets}
        return _record(shard, opened.file_bytes, sha256, stored_bytes)
    finally:
        opened.close()


def _record(shard: ShardRange, file_bytes: int, sha256: str, stored_bytes: dict[str, int]) -> ShardRecord:
    return ShardRecord(
        name=shard.name,
        split=shard.split,
        first_window=shard.first_window,
        num_windows=shard.num_windows,
        file_bytes=file_bytes,
        sha256=sha256,
        stored_bytes=stored_bytes,
    )
