"""Where the files of shards are: in the cache's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class ShardFiles(Protocol):
    """Gives a reader the files of shards by their names. Safe to use from several threads."""

    def path(self, name: str) -> Path:
        """The file of a shard on this machine; returns when it is there and may be opened."""
        ...

    def ahead(self, names: Sequence[str]) -> None:
        """Shards that will be asked for, the soonest first; returns at once."""
        ...


class LocalShardFiles:
    """All shards lie in one folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """Its place in the folder."""
        return self._folder / name

    def ahead(self, names: Sequence[str]) -> None:
        """Nothing is to be done: they are here."""
