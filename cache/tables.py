"""`tables.h5`: what the coders of a cache share, written once before the first shard (docs/format.md, section 5).

Its SHA-256 stands in the spec, hence in every shard. Beside the tables it holds what was measured when they were
chosen, and a fingerprint of what they were made from: a dump that is resumed goes on with them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import zstandard

from tristill.cache.arrays import ArraySpec
from tristill.cache.calibration import Calibration
from tristill.cache.errors import CacheCorruptError, CacheMissingError
from tristill.cache.hdf5 import Hdf5Error, Hdf5File
from tristill.cache.layout import TABLES_NAME
from tristill.cache.regular_file import IrregularFileError, read_regular
from tristill.cache.spec import CacheSpec

_CALIBRATION = "tristill_calibration"
_LARGEST_CALIBRATION_BYTES = 2**24
_LARGEST_FILE_BYTES = 2**32
_FILTER = 32015
_LEVEL = 19
"""Zstandard level: tables are small and written once."""


def tables_image(arrays: tuple[ArraySpec, ...], tables: Mapping[str, np.ndarray], calibration: Calibration) -> bytes:
    """The bytes of the file: every table a dataset of one chunk, little-endian, one Zstandard frame with checksum."""
    compressor = zstandard.ZstdCompressor(_LEVEL, write_checksum=True, write_content_size=True)
    with h5py.File(TABLES_NAME, "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        file.create_dataset(
            _CALIBRATION, track_times=False, data=np.frombuffer(calibration.to_json().encode("ascii"), np.uint8)
        )
        for array in arrays:
            table = np.ascontiguousarray(tables[array.name], dtype=array.dtype)
            assert table.shape == array.shape, f"{array.name}: {table.shape}, expected {array.shape}"
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_chunk(array.shape)
            properties.set_filter(_FILTER, h5py.h5z.FLAG_OPTIONAL, (_LEVEL,))
            properties.set_obj_track_times(False)
            properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple(array.shape, array.shape)
            name = array.name.encode("ascii")
            dataset = h5py.h5d.create(file.id, name, h5py.h5t.py_create(np.dtype(array.dtype)), space, properties)
            dataset.write_direct_chunk((0,) * len(array.shape), compressor.compress(table.tobytes()))
        file.flush()
        image: bytes = file.id.get_file_image()
    return image


def load_tables(folder: Path, spec: CacheSpec) -> dict[str, np.ndarray]:
    """The tables of a cache by name, `<part>.<table>`, read-only; empty if its profile needs none."""
    if spec.tables_fingerprint is None:
        return {}
    content = _read(folder / TABLES_NAME)
    found = hashlib.sha256(content).hexdigest()
    if found != spec.tables_fingerprint:
        raise _corrupt(folder / TABLES_NAME, f"found fingerprint {found}, expected {spec.tables_fingerprint}")
    return _tables_of(content, spec.tables, folder / TABLES_NAME)


def load_calibration(folder: Path) -> Calibration | None:
    """What was measured before the dump in this folder; None if there is no file of tables."""
    path = folder / TABLES_NAME
    try:
        content = _read(path)
    except CacheMissingError:
        return None
    try:
        dataset = Hdf5File.of(content).dataset(_CALIBRATION)
        if dataset is None or dataset.dtype != "|u1":
            raise _corrupt(path, f"has no text {_CALIBRATION}")
        return Calibration.model_validate_json(dataset.whole(_LARGEST_CALIBRATION_BYTES))
    except ValueError as exc:
        raise _corrupt(path, f"is damaged or no HDF5 file of this format ({exc})") from exc


def stored_calibration(folder: Path, spec: CacheSpec) -> Calibration | None:
    """What a manifest repeats: the calibration that stands with the tables; None if the spec has no tables."""
    return load_calibration(folder) if spec.tables_fingerprint else None


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, _LARGEST_FILE_BYTES)
    except FileNotFoundError as exc:
        raise CacheMissingError(f"{path}: is missing; run `tristill cache repair`") from exc
    except IrregularFileError as exc:
        raise _corrupt(path, str(exc)) from exc


def _tables_of(content: bytes, arrays: tuple[ArraySpec, ...], path: Path) -> dict[str, np.ndarray]:
    tables = {}
    try:
        file = Hdf5File.of(content)
        for array in arrays:
            dataset = file.dataset(array.name)
            found = dataset and (dataset.dtype, dataset.shape, dataset.chunks, dataset.filters)
            expected = (array.dtype, array.shape, array.shape, (_FILTER,))
            if dataset is None or found != expected:
                raise _corrupt(
                    path, f"table {array.name} has type, shape, chunk and filters {found}, expected {expected}"
                )
            (chunk,) = dataset.chunk_table(1)
            frame = content[chunk.offset : chunk.offset + chunk.num_bytes]
            declared = zstandard.get_frame_parameters(frame)
            if declared.content_size != array.num_bytes or not declared.has_checksum:
                raise _corrupt(path, f"table {array.name} is not a frame of {array.num_bytes} bytes with checksum")
            table = zstandard.ZstdDecompressor().decompress(
                frame, max_output_size=array.num_bytes, allow_extra_data=False
            )
            tables[array.name] = np.frombuffer(table, array.dtype).reshape(array.shape)
    except (Hdf5Error, zstandard.ZstdError) as exc:
        at = f"at table {arrays[len(tables)].name}"
        raise _corrupt(path, f"is damaged or no HDF5 file of this format ({at}: {exc})") from exc
    return tables


def _corrupt(path: Path, what: str) -> CacheCorruptError:
    return CacheCorruptError(f"{path}: {what}; run `tristill cache repair`")
