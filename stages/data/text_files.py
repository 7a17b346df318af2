"""Documents of text files, compressed or not."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, Literal, TextIO

import pyarrow as pa

from tristill.stages.errors import CorpusError

_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda path: pa.input_stream(str(path), compression="zstd"),
    b"\x04\x22\x4d\x18": lambda path: pa.input_stream(str(path), compression="lz4"),
}
COMPRESSED_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst", ".lz4"})
_BAD_STREAM = (OSError, EOFError, zlib.error, lzma.LZMAError)  # pyarrow raises OSError


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed if it begins as those of gzip, bzip2, xz, Zstandard and LZ4 do."""
    with path.open("rb") as file:
        first = file.read(6)
    opener = next((found for magic, found in _OPENERS.items() if first.startswith(magic)), _plain)
    with opener(path) as content:
        yield content


@contextmanager
def opened_text(path: Path, where: str) -> Iterator[TextIO]:
    """The text of a file in UTF-8, with any line ends as newlines, and without a byte-order mark.

    Raises CorpusError, which names the file as `where`, for what is not such text, when it is read.
    """
    try:
        with opened(path) as content, TextIOWrapper(content, encoding="utf-8-sig") as text:
            yield text
    except UnicodeDecodeError as exc:
        raise CorpusError(f"{where}: is not UTF-8 text ({exc.reason}); convert it or leave it out") from exc
    except _BAD_STREAM as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise CorpusError(f"{where}: cannot be read ({reason}); replace it or leave it out") from exc


def text_documents(path: Path, where: str, unit: Literal["file", "paragraph", "line"]) -> Iterator[str]:
    """The documents of a text file that hold something; a line of blanks is an empty line."""
    with opened_text(path, where) as text:
        match unit:
            case "file":
                yield from filter(None, [text.read()])
            case "line":
                yield from (line.removesuffix("\n") for line in text if not _is_blank(line))
            case "paragraph":
                yield from _paragraphs(text)


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    """Runs of lines that are not blank; the newline before a blank line belongs to neither side."""
    paragraph: list[str] = []
    for line in lines:
        if not _is_blank(line):
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).removesuffix("\n")
            paragraph = []
    if paragraph:
        yield "".join(paragraph)


def _is_blank(line: str) -> bool:
    return not line or line.isspace()


def _plain(path: Path) -> IO[bytes]:
    return path.open("rb")
