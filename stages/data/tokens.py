"""Token ids on disk: a one-dimensional `.npy`, written as a stream and read through a memory map."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cache.atomic import atomic_file
from stages.errors import CorpusError


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
    """Consecutive windows over a token file: window i is tokens [i T, i T + T], so every position occurs once."""

    def __init__(
        self, path: Path, context_length: int, max_windows: int | None = None, mask_path: Path | None = None
    ) -> None:
        """`max_windows` keeps only the first ones. mask_path: which tokens count as labels; None if all do."""
        self._tokens = _memory_map(path)
        self._mask = None if mask_path is None else _memory_map(mask_path)
        if self._mask is not None and self._mask.shape != self._tokens.shape:
            raise CorpusError(
                f"{mask_path}: found {len(self._mask)} tokens, expected {len(self._tokens)} as in {path}; run "
                "`tristill tokenize` again"
            )
        self.context_length = context_length
        num_windows = (len(self._tokens) - 1) // context_length
        self.num_windows = num_windows if max_windows is None else min(num_windows, max_windows)

    @property
    def is_masked(self) -> bool:
        """Whether only some positions count."""
        return self._mask is not None

    def read(self, windows: list[int] | np.ndarray) -> np.ndarray:
        """The ids of these windows, (B, T + 1)."""
        size = self.context_length
        return np.stack([self._tokens[window * size : window * size + size + 1] for window in windows])

    def mask(self, windows: list[int] | np.ndarray) -> np.ndarray | None:
        """(B, T) bool: whether the position counts, its label being a token that does; None if all count."""
        if self._mask is None:
            return None
        size = self.context_length
        return np.stack([self._mask[window * size + 1 : window * size + size + 1] != 0 for window in windows])

    def counts(self) -> np.ndarray:
        """How many positions of every window count, int64."""
        if self._mask is None:
            return np.full(self.num_windows, self.context_length)
        labels = self._mask[1 : self.num_windows * self.context_length + 1]
        counts: np.ndarray = labels.reshape(self.num_windows, self.context_length).sum(axis=1, dtype=np.int64)
        return counts


def _memory_map(path: Path) -> np.ndarray:
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        raise CorpusError(f"{path}: cannot be read as token ids ({exc}); run `tristill tokenize` again") from exc
    return found
