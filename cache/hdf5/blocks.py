"""Blocks of metadata: checked bytes of a file, and the messages of an object (sections II, IV.A)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

UNDEFINED = 2**64 - 1
CHECKSUM_BYTES = 4
LARGEST_HEADER_BYTES = 2**18
"""Of one block of metadata, and of one object's header with all its parts: checksums of more take long here."""
_WORD = 2**32 - 1


class Hdf5Error(ValueError):
    """The bytes are not those of an HDF5 file of the kind that caches are written in."""


class Cursor:
    """Reads little-endian numbers from bytes, one after the other; never beyond their end."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.position = 0

    @property
    def num_left(self) -> int:
        """Bytes that were not read yet."""
        return len(self._content) - self.position

    @property
    def next_byte(self) -> int | None:
        """It stays the next; None at the end."""
        return self._content[self.position] if self.num_left else None

    def take(self, size: int) -> bytes:
        """The next ones."""
        if size > self.num_left:
            raise Hdf5Error(f"a block ends {size - self.num_left} bytes too early")
        self.position += size
        return self._content[self.position - size : self.position]

    def number(self, size: int) -> int:
        """An unsigned number of so many bytes."""
        return int.from_bytes(self.take(size), "little")

    def expect(self, expected: bytes) -> None:
        """Refuses other bytes than these."""
        if (found := self.take(len(expected))) != expected:
            raise Hdf5Error(f"found {found!r}, expected {expected!r}")


@dataclass(frozen=True, slots=True)
class Blocks:
    """Bytes of a file by their place. `read` gives `size` bytes at an offset, fewer where the file ends."""

    read: Callable[[int, int], bytes]
    file_bytes: int

    def at(self, offset: int, size: int) -> bytes:
        """Exactly so many bytes; all of them lie in the file."""
        if offset + size > self.file_bytes:
            raise Hdf5Error(f"{size} bytes at {offset} are not inside of the file's {self.file_bytes}")
        content = self.read(offset, size)
        if len(content) != size:
            raise Hdf5Error(f"the file ends at {offset + len(content)}, in a block of metadata")
        return content

    def checked(self, offset: int, size: int, signature: bytes) -> Cursor:
        """A block of `size` bytes, checksum included, after its signature and without the checksum."""
        if not len(signature) + CHECKSUM_BYTES <= size <= LARGEST_HEADER_BYTES:
            raise Hdf5Error(f"a block of metadata has {size} bytes, expected at most {LARGEST_HEADER_BYTES}")
        content = self.at(offset, size)
        body, stored = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
        cursor = Cursor(body)
        cursor.expect(signature)
        if checksum(body) != int.from_bytes(stored, "little"):
            raise Hdf5Error(f"the checksum of the block {signature.decode('ascii', 'replace')} at {offset} is wrong")
        return cursor


class MessageType(IntEnum):
    """Messages that are looked at; others are of no consequence for what is stored where."""

    DATASPACE = 0x01
    LINK_INFO = 0x02
    DATATYPE = 0x03
    LINK = 0x06
    EXTERNAL_FILES = 0x07
    LAYOUT = 0x08
    FILTERS = 0x0B
    ATTRIBUTE = 0x0C
    CONTINUATION = 0x10


@dataclass(frozen=True, slots=True)
class Message:
    """One message of an object's header."""

    kind: int
    content: bytes


def messages_at(blocks: Blocks, offset: int) -> list[Message]:
    """All messages of the object whose header (version 2) is there, those of continuation blocks at the end."""
    prefix = blocks.at(offset, 6)
    if prefix[:5] != b"OHDR\x02":
        raise Hdf5Error(f"has no header of version 2 at {offset}, found {prefix!r}")
    flags = prefix[5]
    size_bytes = 1 << (flags & 3)
    optional = 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)  # times; limits of attributes
    before = 6 + optional + size_bytes
    chunk_bytes = int.from_bytes(blocks.at(offset + before - size_bytes, size_bytes), "little")
    cursor = blocks.checked(offset, before + chunk_bytes + CHECKSUM_BYTES, b"OHDR")
    cursor.take(before - 4)
    has_order = bool(flags & 0x04)
    messages = list(_messages(cursor, has_order=has_order))
    num_bytes = 0
    for message in messages:  # grows as continuations are met
        if message.kind != MessageType.CONTINUATION:
            continue
        place = Cursor(message.content)
        start, size = place.number(8), place.number(8)
        num_bytes += size
        if num_bytes > LARGEST_HEADER_BYTES:
            raise Hdf5Error(f"an object's header is longer than {LARGEST_HEADER_BYTES} bytes")
        continued = blocks.checked(start, size, b"OCHK")
        messages.extend(_messages(continued, has_order=has_order))
    return messages


def _messages(cursor: Cursor, *, has_order: bool) -> Iterator[Message]:
    while cursor.num_left >= 4 + 2 * has_order:  # a gap that is smaller has no message
        kind, size, flags = cursor.number(1), cursor.number(2), cursor.number(1)
        cursor.take(2 * has_order)
        if flags & 0x02:
            raise Hdf5Error("a message is shared between objects")
        yield Message(kind, cursor.take(size))


def the_only(messages: list[Message], kind: MessageType) -> Cursor:
    """The content of the one message of a kind."""
    found = [message.content for message in messages if message.kind == kind]
    if len(found) != 1:
        raise Hdf5Error(f"an object has {len(found)} messages of type {kind.name}, expected 1")
    return Cursor(found[0])


def checksum(content: bytes) -> int:
    """Bob Jenkins's lookup3, `hashlittle`, of 2006, which HDF5 takes for its metadata; 32 bits."""
    a = b = c = (0xDEADBEEF + len(content)) & _WORD
    whole = max(0, (len(content) - 1) // 12) * 12
    words = memoryview(content)[:whole].cast("I") if whole else ()
    for i in range(0, len(words), 3):
        a += words[i]
        b += words[i + 1]
        c += words[i + 2]
        a = (a - c) & _WORD ^ _rotated(c, 4)
        c += b
        b = (b - a) & _WORD ^ _rotated(a, 6)
        a += c
        c = (c - b) & _WORD ^ _rotated(b, 8)
        b += a
        a = (a - c) & _WORD ^ _rotated(c, 16)
        c += b
        b = (b - a) & _WORD ^ _rotated(a, 19)
        a += c
        c = (c - b) & _WORD ^ _rotated(b, 4)
        b += a
    tail = content[whole:].ljust(12, b"\0")
    if not content:
        return c
    a, b, c = (
        (one + int.from_bytes(tail[i : i + 4], "little")) & _WORD for one, i in zip((a, b, c), (0, 4, 8), strict=True)
    )
    c = ((c ^ b) - _rotated(b, 14)) & _WORD
    a = ((a ^ c) - _rotated(c, 11)) & _WORD
    b = ((b ^ a) - _rotated(a, 25)) & _WORD
    c = ((c ^ b) - _rotated(b, 16)) & _WORD
    a = ((a ^ c) - _rotated(c, 4)) & _WORD
    b = ((b ^ a) - _rotated(a, 14)) & _WORD
    return ((c ^ b) - _rotated(b, 24)) & _WORD


def _rotated(value: int, by: int) -> int:
    value &= _WORD
    return (value << by | value >> (32 - by)) & _WORD
