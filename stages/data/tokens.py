"""Token ids on disk: a one-dimensional `.npy`, written as a stream and read window by window."""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tristill.cache.atomic import atomic_file
from tristill.cache.regular_file import open_regular
from tristill.stages.errors import CorpusError

_BLOCK_TOKENS = 2**22


class TokenFileWriter:
    """Appends ids to a `.npy` whose length is known only at the end."""

    def __init__(self, file: BinaryIO, dtype: str) -> None:
        self._file = file
        self._dtype = np.dtype(dtype)
        self.num_tokens = 0
        self._write_header()
        self._header_bytes = file.tell()

    def append(self, ids: list[int] | np.ndarray) -> None:
        """Add ids at the end."""
        self._file.write(np.asarray(ids, dtype=self._dtype).tobytes())
        self.num_tokens += len(ids)

    def finish(self) -> None:
        """Write the true length into the header; numpy pads headers so that it fits in place."""
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._header_bytes, "numpy no longer pads .npy headers for growth"

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.num_tokens,)}
        np.lib.format.write_array_header_1_0(self._file, header)


@contextmanager
def token_file(path: Path, dtype: str) -> Iterator[TokenFileWriter]:
    """A writer whose file appears as `path` when the block ends without an error."""
    with atomic_file(path) as file:
        writer = TokenFileWriter(file, dtype)
        yield writer
        writer.finish()


class TokenWindows:
    """Consecutive windows over a token file: window i is tokens [i T, i T + T], so every position occurs once.

    With a beginning-of-sequence token (BOS) it is that token and tokens [i T, i T + T - 1], so every token is a label
    once; where the first of these is a BOS itself, as of a chat, it is not repeated: tokens [i T, i T + T].
    """

    def __init__(
        self,
        path: Path,
        context_length: int,
        max_windows: int | None = None,
        mask_path: Path | None = None,
        bos_id: int | None = None,
    ) -> None:
        """`max_windows` keeps only the first ones. mask_path: which tokens count as labels; None if all do."""
        self._tokens = _TokenFile(path)
        self._mask = None if mask_path is None else _TokenFile(mask_path)
        if self._mask is not None and len(self._mask) != len(self._tokens):
            raise CorpusError(
                f"{mask_path}: found {len(self._mask)} tokens, expected {len(self._tokens)} as in {path}; run "
                "`tristill tokenize` again"
            )
        self.context_length = context_length
        self._bos_id = bos_id
        num_windows = num_windows_of(len(self._tokens), context_length, bos_id)
        self.num_windows = num_windows if max_windows is None else min(num_windows, max_windows)

    @property
    def is_masked(self) -> bool:
        """Whether only some positions count."""
        return self._mask is not None

    def read(self, windows: list[int] | np.ndarray) -> np.ndarray:
        """The ids of these windows, (B, T + 1)."""
        size, rows = self.context_length, []
        for window in windows:
            if first := self._first_label(int(window)) - int(window) * size:
                rows.append(self._tokens.read(int(window) * size, size + first))
            else:
                ids = self._tokens.read(int(window) * size, size)
                rows.append(np.concatenate([np.asarray([self._bos_id], ids.dtype), ids]))
        return np.stack(rows)

    def _first_label(self, window: int) -> int:
        """Place of the token that is the label of its first position."""
        first = window * self.context_length
        if self._bos_id is None:
            return first + 1
        has_own = first + self.context_length < len(self._tokens) and self._tokens.read(first, 1)[0] == self._bos_id
        return first + has_own

    def mask(self, windows: list[int] | np.ndarray) -> np.ndarray | None:
        """(B, T) bool: whether the position counts, its label being a token that does; None if all count."""
        if self._mask is None:
            return None
        labels = [self._mask.read(self._first_label(int(window)), self.context_length) for window in windows]
        counts_BT: np.ndarray = np.stack(labels) != 0
        return counts_BT

    def counts(self) -> np.ndarray:
        """How many positions of every window count, int64."""
        if self._mask is None:
            return np.full(self.num_windows, self.context_length)
        size, counts = self.context_length, []
        at_once = max(1, _BLOCK_TOKENS // size)
        for first in range(0, self.num_windows, at_once):
            windows = np.arange(first, min(first + at_once, self.num_windows))
            if self._bos_id is None:
                labels = self._mask.read(first * size + 1, len(windows) * size).reshape(len(windows), size)
            else:
                labels = np.stack([self._mask.read(self._first_label(int(window)), size) for window in windows])
            counts.append(labels.sum(axis=1, dtype=np.int64))
        return np.concatenate(counts) if counts else np.zeros(0, np.int64)


def num_windows_of(num_tokens: int, context_length: int, bos_id: int | None) -> int:
    """Whole windows over so many tokens."""
    return (num_tokens - (bos_id is None)) // context_length


def largest_id(path: Path) -> int:
    """The largest id that occurs in a token file."""
    tokens = _TokenFile(path)
    blocks = range(0, len(tokens), _BLOCK_TOKENS)
    return max(int(tokens.read(first, min(_BLOCK_TOKENS, len(tokens) - first)).max()) for first in blocks)


class _TokenFile:
    """Reads a `.npy` of ids part by part, with `pread`: one that shrinks under a memory map would end the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with os.fdopen(open_regular(path, follows_links=True), "rb") as file:
                self._read_header(file)
                self._descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._descriptor)
        except (OSError, ValueError, EOFError) as exc:
            raise self._refused(exc) from exc

    def _read_header(self, file: BinaryIO) -> None:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"found .npy version {version}, expected (1, 0)")
        shape, _, self._dtype = np.lib.format.read_array_header_1_0(file)
        (self._num_tokens,) = shape
        self._header_bytes = file.tell()
        found, expected = file.seek(0, os.SEEK_END), self._offset(self._num_tokens)
        if self._dtype.kind != "u" or found < expected:
            raise ValueError(f"found {found} bytes of {self._dtype}, expected {expected} of unsigned integers")

    def __len__(self) -> int:
        return self._num_tokens

    def read(self, first: int, count: int) -> np.ndarray:
        """The ids from `first` on. Raises CorpusError if the file has become shorter."""
        wanted = count * self._dtype.itemsize
        try:
            found = os.pread(self._descriptor, wanted, self._offset(first))
        except OSError as exc:
            raise self._refused(exc) from exc
        if len(found) != wanted:
            raise self._refused(f"found {len(found)} bytes at {self._offset(first)}, expected {wanted}")
        return np.frombuffer(found, self._dtype)

    def _offset(self, token: int) -> int:
        return self._header_bytes + token * self._dtype.itemsize

    def _refused(self, why: object) -> CorpusError:
        return CorpusError(f"{self._path}: cannot be read as token ids ({why}); run `tristill tokenize` again")
