"""A file: the attributes of its root group, and the datasets that lie directly in it (sections II.A, III.D, III.G)."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from tristill.cache.hdf5.blocks import (
    CHECKSUM_BYTES,
    UNDEFINED,
    Blocks,
    Cursor,
    Hdf5Error,
    Message,
    MessageType,
    checksum,
    messages_at,
    the_only,
)
from tristill.cache.hdf5.datasets import StoredDataset, dataset_at, shape_of

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_STRING = 3
_HEAP_HEADER_BYTES = 146
_LARGEST_HEAP_BLOCK_BYTES = 2**16
_HARD_LINK = 0

Value = TypeVar("Value")


class Hdf5File:
    """What the root group holds. Raises Hdf5Error for all that caches are not written in."""

    def __init__(self, read: Callable[[int, int], bytes], file_bytes: int) -> None:
        """`read` gives the bytes at an offset, so many of them or fewer where the file ends."""
        self._blocks = Blocks(read, file_bytes)
        superblock = self._blocks.checked(0, 48, _SIGNATURE)
        if superblock.number(1) not in (2, 3):
            raise Hdf5Error("found a superblock of another version than 2 and 3")
        superblock.expect(b"\x08\x08")  # bytes of addresses and of sizes
        superblock.number(1)  # how it was opened last
        base, _, end, root = (superblock.number(8) for _ in range(4))
        if base or end > file_bytes:
            raise Hdf5Error(f"the file begins at {base} and ends at {end}, expected 0 and at most {file_bytes}")
        messages = messages_at(self._blocks, root)
        self._texts = _unique(_attribute(Cursor(m.content)) for m in messages if m.kind == MessageType.ATTRIBUTE)
        self._links = _unique(_links(self._blocks, messages))

    @classmethod
    def of(cls, content: bytes) -> "Hdf5File":
        """Of bytes in memory."""
        return cls(lambda offset, size: content[offset : offset + size], len(content))

    def text(self, name: str) -> bytes | None:
        """The attribute of that name; None if there is none. Raises Hdf5Error if it is no fixed-length string."""
        if name.encode("ascii") not in self._texts:
            return None
        text = self._texts[name.encode("ascii")]
        if text is None:
            raise Hdf5Error(f"attribute {name} is not a fixed-length string of moderate size")
        return text

    def dataset(self, name: str) -> StoredDataset | None:
        """The dataset of that name; None if there is no hard link of that name."""
        address = self._links.get(name.encode("ascii"))
        return None if address is None else dataset_at(self._blocks, address)


def _unique(pairs: Iterator[tuple[bytes, Value]]) -> dict[bytes, Value]:
    found: dict[bytes, Value] = {}
    for name, value in pairs:
        if name in found:
            raise Hdf5Error(f"the root has {name!r} twice")
        found[name] = value
    return found


def _attribute(message: Cursor) -> tuple[bytes, bytes | None]:
    """Name and value of an attribute (version 3); None if it is not one fixed-length string."""
    message.expect(b"\x03\x00")  # nothing in it is shared
    name_bytes, type_bytes, space_bytes = (message.number(2) for _ in range(3))
    message.number(1)
    name = message.take(name_bytes).rstrip(b"\0")
    kind, shape = Cursor(message.take(type_bytes)), shape_of(Cursor(message.take(space_bytes)))
    family, _, size = kind.number(1) & 15, kind.number(3), kind.number(4)
    is_text = family == _STRING and shape is None
    return name, message.take(size).rstrip(b"\0") if is_text else None


def _links(blocks: Blocks, messages: list[Message]) -> Iterator[tuple[bytes, int | None]]:
    """Names in the root and where their objects are; None for links of other kinds than hard ones."""
    for message in messages:
        if message.kind == MessageType.LINK:
            yield _link(Cursor(message.content))
    info = the_only(messages, MessageType.LINK_INFO)
    info.expect(b"\x00")
    info.take(8 if info.number(1) & 1 else 0)
    if (heap := info.number(8)) != UNDEFINED:
        yield from _links_of_heap(blocks, heap)


def _link(message: Cursor) -> tuple[bytes, int | None]:
    message.expect(b"\x01")
    flags = message.number(1)
    kind = message.number(1) if flags & 0x08 else _HARD_LINK
    message.take(8 * bool(flags & 0x04) + bool(flags & 0x10))  # order of creation; character set
    name = message.take(message.number(1 << (flags & 3)))
    if kind == _HARD_LINK:
        return name, message.number(8)
    message.take(message.number(2))
    return name, None


def _links_of_heap(blocks: Blocks, offset: int) -> Iterator[tuple[bytes, int | None]]:
    """More links than fit into a header are in a fractal heap; an index by name beside it is not needed here.

    Links were only ever added, so that they stand in its blocks one after the other.
    """
    header = blocks.checked(offset, _HEAP_HEADER_BYTES, b"FRHP")
    header.expect(b"\x00")
    header.number(2)
    filter_bytes, flags = header.number(2), header.number(1)
    header.take(60)
    num_links = header.number(8)
    header.take(32)
    width, start_bytes, _, heap_bits, _ = (header.number(size) for size in (2, 8, 8, 2, 2))
    root, num_rows = header.number(8), header.number(2)
    if filter_bytes or not flags & 0x02 or not 0 < start_bytes <= _LARGEST_HEAP_BLOCK_BYTES:
        raise Hdf5Error("the heap of links is filtered, unchecked, or of large blocks")
    place_bytes = -(-heap_bits // 8)
    places = [(root, start_bytes)]
    if num_rows:
        sizes = [start_bytes << max(0, row - 1) for row in range(num_rows) for _ in range(width)]
        if len(sizes) > 64 or sizes[-1] > _LARGEST_HEAP_BLOCK_BYTES:
            raise Hdf5Error(f"the heap of links has {len(sizes)} blocks")
        table = blocks.checked(root, 13 + place_bytes + 8 * len(sizes) + CHECKSUM_BYTES, b"FHIB")
        table.take(9 + place_bytes)
        places = [(table.number(8), size) for size in sizes]
    num_found = 0
    for place, size in places:
        if place == UNDEFINED:
            continue
        block = _heap_block(blocks, place, size, 13 + place_bytes)
        while block.next_byte == 1:  # the version of a link; beyond the last one there are zeros
            yield _link(block)
            num_found += 1
    if num_found != num_links:
        raise Hdf5Error(f"the heap of links has {num_found}, expected {num_links}")


def _heap_block(blocks: Blocks, offset: int, size: int, header_bytes: int) -> Cursor:
    """The objects of a direct block, whose checksum is in its header and counts as zero there."""
    content = blocks.at(offset, size)
    if size < header_bytes + CHECKSUM_BYTES or content[:4] != b"FHDB":
        raise Hdf5Error(f"found {content[:4]!r} at {offset}, expected a block of the heap of links")
    stored = int.from_bytes(content[header_bytes : header_bytes + CHECKSUM_BYTES], "little")
    objects = content[header_bytes + CHECKSUM_BYTES :]
    if checksum(content[:header_bytes] + bytes(CHECKSUM_BYTES) + objects) != stored:
        raise Hdf5Error(f"the checksum of the block FHDB at {offset} is wrong")
    return Cursor(objects)
