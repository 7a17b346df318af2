"""Datasets: type, shape, filters, and where their bytes lie (sections IV.A.2, VII.C)."""

import math
from dataclasses import dataclass

from tristill.cache.hdf5.blocks import (
    CHECKSUM_BYTES,
    UNDEFINED,
    Blocks,
    Cursor,
    Hdf5Error,
    MessageType,
    messages_at,
    the_only,
)

_CHUNKED, _CONTIGUOUS = 2, 1
_SINGLE_CHUNK, _FIXED_ARRAY = 1, 3
_MAX_RANK = 32
# Class, bit field, size, then what follows: the datatypes of docs/format.md as HDF5 encodes them, but for the version.
_INTEGER, _FLOAT = 0, 1
_FLOAT_PROPERTIES = {
    2: bytes.fromhex("0000 1000 0a05 000a 0f000000"),
    4: bytes.fromhex("0000 2000 1708 0017 7f000000"),
}


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Where the stored bytes of one chunk lie in the file."""

    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoredDataset:
    """A dataset as its header describes it. chunks: shape of a chunk; None if the bytes lie in one piece."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...] | None
    filters: tuple[int, ...]
    _blocks: Blocks
    _index: bytes

    def chunk_table(self, num_chunks: int) -> list[StoredChunk]:
        """The chunks in order, of a dataset that has so many, in its first dimension alone; all lie in the file."""
        if self.chunks is None:
            raise Hdf5Error("is in one piece, not in chunks")
        index = Cursor(self._index)
        kind = index.number(1)
        if kind == _SINGLE_CHUNK and num_chunks == 1:
            size, mask, address = index.number(8), index.number(4), index.number(8)
            entries = [(address, size, mask)]
        elif kind == _FIXED_ARRAY:
            index.number(1)
            entries = _fixed_array(self._blocks, index.number(8), num_chunks)
        else:
            raise Hdf5Error(f"has a chunk index of type {kind}, expected a fixed array of {num_chunks} chunks")
        num_bytes = self._blocks.file_bytes
        good = [StoredChunk(at, size) for at, size, mask in entries if at + size <= num_bytes and not mask]
        if len(good) != num_chunks:
            raise Hdf5Error(f"has {len(good)} readable chunks, expected {num_chunks}")
        return good

    def whole(self, largest_bytes: int) -> bytes:
        """The bytes of a dataset that lies in one piece, without filters."""
        index = Cursor(self._index)
        if self.chunks is not None or self.filters:
            raise Hdf5Error("is in chunks or filtered, expected plain bytes")
        address, size = index.number(8), index.number(8)
        expected = math.prod(self.shape) * int(self.dtype[2:])
        if size != expected or not 0 < size <= largest_bytes:
            raise Hdf5Error(f"has {size} bytes, expected {expected}, and at most {largest_bytes}")
        return self._blocks.at(address, size)


def dataset_at(blocks: Blocks, offset: int) -> StoredDataset:
    """What the object's header says; the chunks are not looked up yet."""
    messages = messages_at(blocks, offset)
    if any(message.kind == MessageType.EXTERNAL_FILES for message in messages):
        raise Hdf5Error("has its bytes in other files")
    kinds = {message.kind for message in messages}
    if not {MessageType.DATATYPE, MessageType.DATASPACE, MessageType.LAYOUT} <= kinds:
        raise Hdf5Error("is no dataset")
    filters = _filters(the_only(messages, MessageType.FILTERS)) if MessageType.FILTERS in kinds else ()
    shape = shape_of(the_only(messages, MessageType.DATASPACE))
    if shape is None:
        raise Hdf5Error("is a single value")
    chunks, index = _layout(the_only(messages, MessageType.LAYOUT))
    return StoredDataset(_dtype(the_only(messages, MessageType.DATATYPE)), shape, chunks, filters, blocks, index)


def shape_of(space: Cursor) -> tuple[int, ...] | None:
    """The dimensions of a dataspace (version 2); None of a single value."""
    space.expect(b"\x02")
    rank, _, kind = space.number(1), space.number(1), space.number(1)
    if rank > _MAX_RANK or kind > 1:
        raise Hdf5Error(f"a dataspace has {rank} dimensions and type {kind}")
    return tuple(space.number(8) for _ in range(rank)) if kind == 1 else None


def _dtype(kind: Cursor) -> str:
    """As numpy writes it; `class C, N bytes` for a type that caches do not use."""
    family, bits, size = kind.number(1) & 15, kind.number(3), kind.number(4)
    rest = kind.take(min(kind.num_left, 12))
    order = "|" if size == 1 else "<"
    if family == _INTEGER and bits & ~8 == 0 and rest[:4] == bytes([0, 0, 8 * size & 255, 0]) and size in (1, 2, 4):
        return f"{order}{'i' if bits & 8 else 'u'}{size}"
    if family == _FLOAT and bits == (8 * size - 1) << 8 | 0x20 and rest == _FLOAT_PROPERTIES.get(size):
        return f"{order}f{size}"
    return f"class {family}, {size} bytes"


def _filters(pipeline: Cursor) -> tuple[int, ...]:
    pipeline.expect(b"\x02")
    found = []
    for _ in range(pipeline.number(1)):
        number = pipeline.number(2)
        name_bytes = pipeline.number(2) if number >= 256 else 0
        pipeline.number(2)
        num_values = pipeline.number(2)
        pipeline.take(name_bytes + 4 * num_values)
        found.append(number)
    return tuple(found)


def _layout(layout: Cursor) -> tuple[tuple[int, ...] | None, bytes]:
    """Shape of a chunk and where its index is, or None and where the bytes are."""
    version, family = layout.number(1), layout.number(1)
    if family == _CONTIGUOUS and version in (3, 4):
        return None, layout.take(16)
    if family != _CHUNKED or version != 4:
        raise Hdf5Error(f"is stored in layout {family} of version {version}")
    _, rank, size_bytes = layout.number(1), layout.number(1), layout.number(1)
    if not 1 < rank <= _MAX_RANK or size_bytes > 8:
        raise Hdf5Error(f"has chunks of {rank} dimensions")
    chunks = tuple(layout.number(size_bytes) for _ in range(rank))[:-1]  # the last is the size of an element
    return chunks, layout.take(layout.num_left)


def _fixed_array(blocks: Blocks, offset: int, num_chunks: int) -> list[tuple[int, int, int]]:
    """(address, size, filter mask) of every chunk."""
    header = blocks.checked(offset, 28, b"FAHD")
    header.expect(b"\x00\x01")  # version; with filters
    entry_bytes, page_bits = header.number(1), header.number(1)
    num_entries, data_block = header.number(8), header.number(8)
    if num_entries != num_chunks or not 12 < entry_bytes <= 20 or data_block == UNDEFINED:
        raise Hdf5Error(f"has a table of {num_entries} chunks, expected {num_chunks}")
    prefix_bytes = 14
    page_entries = 1 << min(page_bits, 63)
    if num_chunks <= page_entries:
        size = prefix_bytes + num_chunks * entry_bytes + CHECKSUM_BYTES
        table = blocks.checked(data_block, size, b"FADB")
        table.take(prefix_bytes - 4)
        return _entries(table, num_chunks, entry_bytes)
    num_pages = -(-num_chunks // page_entries)
    prefix_bytes += -(-num_pages // 8) + CHECKSUM_BYTES
    blocks.checked(data_block, prefix_bytes, b"FADB")
    found: list[tuple[int, int, int]] = []
    place = data_block + prefix_bytes
    while len(found) < num_chunks:
        count = min(page_entries, num_chunks - len(found))
        size = count * entry_bytes + CHECKSUM_BYTES
        found += _entries(blocks.checked(place, size, b""), count, entry_bytes)
        place += size
    return found


def _entries(table: Cursor, count: int, entry_bytes: int) -> list[tuple[int, int, int]]:
    return [(table.number(8), table.number(entry_bytes - 12), table.number(4)) for _ in range(count)]
