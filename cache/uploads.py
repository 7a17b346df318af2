"""Finished shards on their way to a URL while a dump goes on; the manifest is put there last, which commits the cache.

Beside every shard that has arrived stands a small record, by which a dump that goes on, here or on another machine,
knows what it need not write again.
"""

import queue
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tristill.cache.errors import CacheError, CacheMismatchError, CacheRequestError, CacheStoreError
from tristill.cache.hashing import canonical_json, fingerprint_of
from tristill.cache.layout import MANIFEST_NAME, shard_ranges
from tristill.cache.locks import lock
from tristill.cache.manifest import Manifest, ShardRecord
from tristill.cache.room import ROOM_LOCK, free_room
from tristill.cache.spec import CacheSpec, Fingerprint, differences
from tristill.cache.store import Store, StoredFile

RECORDS_FOLDER = "records"
_THREADS = 2
_THREADS_FOR_RECORDS = 8
_LARGEST_RECORD_BYTES = 2**20
_WAIT_S = 0.2


class UploadRecord(BaseModel):
    """That a shard has arrived: of which spec it is, and which version of the file the store named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: Fingerprint
    version: Annotated[str, Field(max_length=1000)]
    shard: ShardRecord


class Uploads:
    """What of one dump is at the URL, and what is on its way there. Used by the thread that writes the cache."""

    def __init__(
        self, folder: Path, store: Store, committed: Manifest | None, spec: CacheSpec, local_bytes: int | None
    ) -> None:
        """Raises CacheMismatchError if another cache, or a part of one, is at the URL."""
        self._folder = folder
        self._store = store
        self._local_bytes = local_bytes
        self._spec = fingerprint_of(spec.model_dump(mode="json"))
        self._queue: queue.SimpleQueue[ShardRecord] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._num_pending = 0
        self._failure: CacheError | None = None
        self._threads: list[threading.Thread] = []
        self.records = self._arrived(committed, spec)
        """Of the shards that are there, by name: they need not be written."""

    def put_first(self, contents: Mapping[str, bytes]) -> None:
        """Put files there that shards are of no use without."""
        for name, content in contents.items():
            self._store.write(name, content)

    def make_room(self, name: str, num_bytes: int) -> None:
        """Return when a shard may be written: local copies of those that have arrived make room for it.

        Room is not reserved: of several processes that write, each may go beyond the bound by a shard.
        """
        if self._local_bytes is None:
            return
        if num_bytes > self._local_bytes:
            raise CacheRequestError(
                f"cache.local_bytes: found {self._local_bytes:,}, expected at least {2 * num_bytes:,}: a shard takes "
                f"{num_bytes:,}, and another is written while it is uploaded"
            )
        while True:
            with lock(self._folder, ROOM_LOCK):
                if free_room(self._folder, self._local_bytes, num_bytes, self._order, own=name):
                    return
            with self._changed:
                self._raise_failure()
                if not self._num_pending:
                    return  # shards of other processes, which make room themselves
                self._changed.wait(_WAIT_S)

    def put(self, record: ShardRecord) -> None:
        """Bring a shard that is in the folder there, in the background."""
        with self._changed:
            self._raise_failure()
            self._num_pending += 1
        self._queue.put(record)
        if len(self._threads) < _THREADS:
            self._threads.append(threading.Thread(target=self._work, name="cache-upload", daemon=True))
            self._threads[-1].start()

    def wait(self) -> None:
        """Return when all shards that were put have arrived."""
        with self._changed:
            while self._num_pending and self._failure is None:
                self._changed.wait(_WAIT_S)
            self._raise_failure()

    def commit(self, manifest: Manifest) -> None:
        """Wait until all shards have arrived, then put the manifest there. Other ranks have waited for theirs."""
        self.wait()
        self._store.write(MANIFEST_NAME, manifest.to_json().encode("ascii"))

    def _work(self) -> None:
        while True:
            record = self._queue.get()
            try:
                self._upload(record)
            except CacheError as exc:
                with self._changed:
                    self._failure = exc
            except Exception as exc:  # noqa: BLE001 - raised where the dump waits; a thread that ends is waited for ever
                with self._changed:
                    self._failure = CacheStoreError(f"{self._store.url}: {record.name} could not be written ({exc})")
            with self._changed:
                self._num_pending -= 1
                self._changed.notify_all()
                if self._failure is not None:
                    return

    def _upload(self, record: ShardRecord) -> None:
        try:
            content = (self._folder / record.name).read_bytes()
        except OSError as exc:
            raise CacheError(f"{self._folder / record.name}: could not be read ({exc})") from exc
        stored = self._store.write(record.name, content)
        arrived = UploadRecord(spec=self._spec, version=stored.version, shard=record)
        as_json = canonical_json(arrived.model_dump(mode="json")).encode("ascii")
        self._store.write(_record_name(record.name), as_json)
        with self._changed:
            self.records[record.name] = record

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _order(self, name: str) -> int | None:
        with self._changed:
            return 0 if name in self.records else None

    def _arrived(self, committed: Manifest | None, spec: CacheSpec) -> dict[str, ShardRecord]:
        there = self._store.list()
        if committed is not None:
            if problem := differences(committed.spec, spec):
                raise self._other(problem)
            return {
                record.name: record
                for record in committed.shards
                if record.name in there and there[record.name].num_bytes == record.file_bytes
            }
        recorded = self._store.list(RECORDS_FOLDER)
        names = [shard.name for shard in shard_ranges(spec) if f"{shard.name}.json" in recorded and shard.name in there]
        with ThreadPoolExecutor(_THREADS_FOR_RECORDS, thread_name_prefix="cache-records") as pool:
            found = pool.map(lambda name: self._read_record(name, there[name]), names)
            return {record.name: record for record in found if record is not None}

    def _read_record(self, name: str, stored: StoredFile) -> ShardRecord | None:
        """The record of a shard, None if it is not that of the file that is there."""
        content = self._store.read(_record_name(name), _LARGEST_RECORD_BYTES)
        try:
            found = UploadRecord.model_validate_json(content or b"")
        except ValidationError:
            return None
        if found.spec != self._spec:
            raise self._other(f"{name} is recorded with another spec")
        is_right = (found.shard.name, found.shard.file_bytes, found.version) == (name, stored.num_bytes, stored.version)
        return found.shard if is_right else None

    def _other(self, problem: str) -> CacheMismatchError:
        return CacheMismatchError(
            f"{self._store.url}: holds another cache, or a part of one: {problem}; set cache.url to another place, or "
            "remove what is there yourself"
        )


def _record_name(shard: str) -> str:
    return f"{RECORDS_FOLDER}/{shard}.json"
