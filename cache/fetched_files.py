"""Shards of a cache at a URL, fetched when they are needed and before, into a local folder that is bounded.

The folder may be shared by processes of one machine: each shard is fetched by one of them, under its lock, and gets its
name when its size and SHA-256 are those of the manifest.
"""

import os
import stat
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tristill.cache.atomic import atomic_file
from tristill.cache.errors import CacheError, CacheRequestError, CacheStoreError, CacheWriteError
from tristill.cache.hashing import sha256_of_file
from tristill.cache.locks import lock
from tristill.cache.manifest import ShardRecord
from tristill.cache.room import ROOM_LOCK, free_room
from tristill.cache.store import Store

_THREADS = 4
_SHARDS_AT_ONCE = 2
"""For which there must be room: one that is read and one that is fetched."""
_WAIT_S = 0.05


class _NoRoomError(Exception):
    """What is in the folder is needed sooner."""


class FetchedShardFiles:
    """The shards that `records` declare, of which the folder holds at most local_bytes (None: all that were asked for).

    A shard found in the folder is trusted once this process has found its SHA-256 right.
    """

    def __init__(self, folder: Path, store: Store, records: Mapping[str, ShardRecord], local_bytes: int | None) -> None:
        """Raises CacheRequestError if local_bytes is too small to read at all."""
        self._folder = folder
        self._store = store
        self._records = records
        self._local_bytes = local_bytes
        least = _SHARDS_AT_ONCE * max((record.file_bytes for record in records.values()), default=0)
        if local_bytes is not None and local_bytes < least:
            raise CacheRequestError(
                f"cache.local_bytes: found {local_bytes:,}, expected at least {least:,}, which are "
                f"{_SHARDS_AT_ONCE} of the largest shard of {store.url}"
            )
        self._lock = threading.Lock()
        self._trusted: dict[str, tuple[int, int, int]] = {}
        self._wanted: dict[str, int] = {}
        self._queue: deque[str] = deque()
        self._num_threads = 0
        self._failed: dict[str, CacheError] = {}

    @contextmanager
    def held(self, name: str) -> Iterator[Path]:
        """See ShardFiles. Raises CacheStoreError or CacheCorruptError, naming the URL, if it cannot be had."""
        record = self._records[name]
        started = time.monotonic()
        while True:
            with lock(self._folder, name, shared=True):
                if self._is_here(record):
                    yield self._folder / name
                    return
            with self._lock:
                failure = self._failed.pop(name, None)
            if failure is not None:
                raise failure
            try:
                self._fetch(record)
            except _NoRoomError:
                if time.monotonic() - started > self._store.patience.total_s:
                    raise CacheWriteError(
                        f"{self._folder}: found no room for {name} within cache.local_bytes {self._local_bytes:,}: "
                        "other processes fetch into all of it; raise it by two shards for each of them"
                    ) from None
                time.sleep(_WAIT_S)

    def ahead(self, names: Sequence[str]) -> None:
        """See ShardFiles. What fails is said when the shard is asked for."""
        with self._lock:
            self._wanted = {name: place for place, name in reversed(list(enumerate(names)))}
            self._queue = deque(dict.fromkeys(names))
            self._failed.clear()
            for _ in range(min(_THREADS, len(self._queue)) - self._num_threads):
                self._num_threads += 1
                threading.Thread(target=self._fetch_ahead, name="cache-fetch", daemon=True).start()

    def close(self) -> None:
        """See ShardFiles; a fetch that is under way ends by itself."""
        with self._lock:
            self._queue.clear()

    def _fetch_ahead(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._num_threads -= 1
                    return
                name = self._queue.popleft()
            try:
                self._fetch(self._records[name], is_ahead=True)
            except _NoRoomError:
                self.close()
            except CacheError as exc:
                with self._lock:
                    self._failed[name] = exc
            except Exception as exc:  # noqa: BLE001 - raised where the shard is asked for
                with self._lock:
                    self._failed[name] = CacheStoreError(f"{self._store.url}: {name} could not be fetched ({exc})")

    def _fetch(self, record: ShardRecord, *, is_ahead: bool = False) -> None:
        name = record.name
        try:
            # Names change under the room's lock too: whoever counts would miss a file that gets its own meanwhile.
            with lock(self._folder, name), ExitStack() as until_named:
                if self._is_here(record):
                    return
                with atomic_file(self._folder / name) as file:
                    if self._local_bytes is not None:
                        with lock(self._folder, ROOM_LOCK):
                            order = self._order(is_ahead=is_ahead)
                            if not free_room(self._folder, self._local_bytes, record.file_bytes, order, own=name):
                                raise _NoRoomError
                            file.truncate(record.file_bytes)  # seen by others as taken
                    self._store.fetch(name, record.file_bytes, record.sha256, file)
                    file.flush()
                    os.fsync(file.fileno())
                    until_named.enter_context(lock(self._folder, ROOM_LOCK))
                with self._lock:
                    self._trusted[name] = _identity((self._folder / name).stat())
        except OSError as exc:
            raise CacheWriteError(
                f"{self._folder / name}: could not be written ({exc.strerror or exc}); free some space, fix the "
                "permissions or lower cache.local_bytes, and run the same command again"
            ) from exc

    def _order(self, *, is_ahead: bool) -> "_Order":
        with self._lock:
            return _Order(self._wanted, is_ahead=is_ahead)

    def _is_here(self, record: ShardRecord) -> bool:
        """Whether the shard is in the folder and right; it then counts as used now."""
        path = self._folder / record.name
        try:
            found = path.lstat()
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(found.st_mode) or found.st_size != record.file_bytes:
            return False
        with self._lock:
            is_trusted = self._trusted.get(record.name) == _identity(found)
        if not is_trusted:
            if sha256_of_file(path) != record.sha256:
                return False
            with self._lock:
                self._trusted[record.name] = _identity(found)
        os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
        return True


class _Order:
    """Which shards go first: those that are not wanted, then, unless for one that is not needed yet, the farthest."""

    def __init__(self, wanted: Mapping[str, int], *, is_ahead: bool) -> None:
        self._wanted = wanted
        self._is_ahead = is_ahead

    def __call__(self, name: str) -> int | None:
        place = self._wanted.get(name)
        if place is None:
            return 0
        return None if self._is_ahead else len(self._wanted) - place


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_mtime_ns, found.st_size
