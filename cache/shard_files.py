"""Where the files of shards are: in the cache's folder."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol


class ShardFiles(Protocol):
    """Gives a reader the files of shards by their names. Safe to use from several threads."""

    def held(self, name: str) -> AbstractContextManager[Path]:
        """The file of a shard on this machine; it is there, and may be opened, while the block lasts."""
        ...

    def ahead(self, names: Sequence[str]) -> None:
        """Shards that will be asked for, the soonest first, in place of those told before; returns at once."""
        ...

    def close(self) -> None:
        """Bring nothing more that was told ahead."""
        ...


class LocalShardFiles:
    """All shards lie in one folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def held(self, name: str) -> Iterator[Path]:
        """Its place in the folder."""
        yield self._folder / name

    def ahead(self, names: Sequence[str]) -> None:
        """Nothing is to be done: they are here."""

    def close(self) -> None:
        """Nothing is to be done."""
