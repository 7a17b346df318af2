"""Files of a corpus at URLs: found by fsspec, and fetched one after the other into a temporary file to be read."""

import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from tristill.cache.errors import CacheError
from tristill.cache.store import Patience, Store, StoredFile
from tristill.stages.errors import CorpusError
from tristill.stages.progress import say

IMPATIENT = Patience(attempts=2, timeout_s=15.0, total_s=20.0)
"""For a look at whether files changed, which goes on without an answer."""


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL, as it was when it was found."""

    url: str
    stored: StoredFile

    def __str__(self) -> str:
        """The URL."""
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        """What the name ends with, with its dot."""
        return PurePosixPath(self.url).suffix

    @contextmanager
    def here(self) -> Iterator[Path]:
        """Its content in a file that lasts as long as the block. Raises CorpusError if it is not what was found."""
        folder, name = posixpath.split(self.url)
        store = Store(folder, say)
        with TemporaryDirectory(prefix="tristill-") as place:
            path = Path(place) / f"fetched{self.suffix}"
            try:
                with path.open("wb") as file:
                    store.fetch(name, self.stored.num_bytes, None, file)
                found = store.look(name)
            except CacheError as exc:
                raise CorpusError(str(exc)) from exc
            if found != self.stored:
                raise CorpusError(f"{self.url}: changed while it was read; run the same command again")
            yield path


def is_url(pattern: str) -> bool:
    """Whether a path of a corpus is one for fsspec."""
    return "://" in pattern


def remote_files(pattern: str, patience: Patience | None = None) -> list[RemoteFile]:
    """The file at a URL, all files in that folder, or those of a glob, sorted by path. Raises CorpusError."""
    parts = pattern.split("/")
    first = next((n for n, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    base, rest = "/".join(parts[:first]), "/".join(parts[first:])
    try:
        found = Store(base, say, patience).matching(rest)
    except FileNotFoundError:
        found = {}
    except CacheError as exc:
        raise CorpusError(str(exc)) from exc
    files = [RemoteFile(url, stored) for url, stored in found.items()]
    return sorted(files, key=lambda file: PurePosixPath(file.url))


def brought_here(files: Sequence[Path | RemoteFile]) -> Iterator[tuple[Path, str]]:
    """Every file on this machine, and its name or URL; one that was fetched is there until the next is asked for."""
    for file in files:
        if isinstance(file, Path):
            yield file, str(file)
            continue
        with file.here() as path:
            yield path, file.url
