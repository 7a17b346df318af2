"""A cache at a URL and its local copy: manifest, tables and tokenizer whole, and as many shards as there is room for.

The URL is what counts: there is a cache if its manifest is there, and the folder only keeps what was fetched.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from tristill.cache.atomic import atomic_file, write_atomically
from tristill.cache.copies import copy_in, set_copy
from tristill.cache.errors import CacheCorruptError, CacheMismatchError, CacheMissingError
from tristill.cache.fetched_files import FetchedShardFiles
from tristill.cache.hashing import sha256_of_file
from tristill.cache.layout import LARGEST_COMPANION_BYTES, MANIFEST_NAME, TABLES_NAME, TOKENIZER_NAME
from tristill.cache.locks import lock
from tristill.cache.manifest import LARGEST_MANIFEST_BYTES, Manifest
from tristill.cache.regular_file import parsed_json, read_file
from tristill.cache.spec import CacheSpec, describe
from tristill.cache.store import Patience, Store
from tristill.cache.uploads import RECORDS_FOLDER, Uploads

COPY_NAME = "copy.json"
_COPY_LOCK = "copy"
_LARGEST_TOKENIZER_BYTES = 2**28
_LARGEST_TABLES_BYTES = 2**32
_SIDE_BY_SIDE = 64
"""Shards that a reader takes windows from in turn: docs/format.md, section 10."""


class CacheCopy:
    """The cache at a URL, and the folder that is its local copy."""

    def __init__(
        self,
        folder: Path,
        url: str,
        local_bytes: int | None,
        tell: Callable[[str], object],
        patience: Patience | None = None,
    ) -> None:
        self.folder = folder
        self.store = Store(url, tell, patience)
        self.local_bytes = local_bytes
        self._tell = tell
        self._lock = threading.Lock()
        self._is_fresh = self._is_told = False

    def refresh(self) -> None:
        """See Copy. Looks at the URL once in the life of a process that finds a cache there."""
        with self._lock:
            if self._is_fresh:
                return
            manifest = self.manifest_at_url()
            if manifest is None:
                raise CacheMissingError(f"{self.store.url}: {self._found_there()}; run `tristill dump-logits`")
            content = manifest.to_json().encode("ascii")
            self.folder.mkdir(parents=True, exist_ok=True)
            with lock(self.folder, _COPY_LOCK):
                path = self.folder / MANIFEST_NAME
                is_same = path.is_file() and path.read_bytes() == content
                if path.is_file() and not self._is_claimed() and (not is_same or self.lost_shards(manifest)):
                    what = "the cache, more whole" if is_same else "another cache"
                    raise CacheMismatchError(
                        f"{self.folder}: holds {what} than {self.store.url}, and is no copy of it; set cache.dir to "
                        "another folder, or remove the cache in this one yourself"
                    )
                self._claim()
                spec = manifest.spec
                if spec.tables_fingerprint is not None:
                    self._bring(TABLES_NAME, spec.tables_fingerprint, _LARGEST_TABLES_BYTES)
                self._bring(TOKENIZER_NAME, spec.tokenizer_fingerprint, _LARGEST_TOKENIZER_BYTES)
                for name, sha256 in manifest.companions.items():
                    self._bring(name, sha256, LARGEST_COMPANION_BYTES)
                if not is_same:
                    write_atomically(path, content)
            self._is_fresh = True

    def manifest_at_url(self) -> Manifest | None:
        """The checked manifest at the URL; None if there is none."""
        content = self.store.read(MANIFEST_NAME, LARGEST_MANIFEST_BYTES)
        if content is None:
            return None
        try:
            return Manifest.model_validate_json(content)
        except ValidationError as exc:
            raise CacheCorruptError(
                f"{self.store.url}/{MANIFEST_NAME}: the manifest breaks the cache format:\n{describe(exc)}\n"
                "delete it there and run `tristill dump-logits`, which makes it again"
            ) from exc

    def shard_files(self, manifest: Manifest) -> FetchedShardFiles:
        """The files of its shards. Raises CacheRequestError if local_bytes is too small."""
        records = {record.name: record for record in manifest.shards}
        self._tell_if_narrow([record.file_bytes for record in manifest.shards])
        return FetchedShardFiles(self.folder, self.store, records, self.local_bytes)

    def lost_shards(self, manifest: Manifest) -> list[str]:
        """Names of the shards that are not at the URL in their size."""
        there = self.store.list()
        return [
            record.name
            for record in manifest.shards
            if record.name not in there or there[record.name].num_bytes != record.file_bytes
        ]

    def is_begun(self) -> bool:
        """Whether a dump has put anything there."""
        return bool(self.store.list()) or bool(self.store.list(RECORDS_FOLDER))

    def bring_begun(self) -> None:
        """Bring the tables of a dump that was begun elsewhere, with which it is to go on."""
        if (self.folder / TABLES_NAME).exists():
            return
        found = self.store.look(TABLES_NAME)
        if found is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._bring(TABLES_NAME, None, _LARGEST_TABLES_BYTES)

    def uploads(self, spec: CacheSpec) -> Uploads:
        """What brings finished shards to the URL."""
        return Uploads(self.folder, self.store, self.manifest_at_url(), spec, self.local_bytes)

    def claim(self) -> None:
        """Write down that the folder is a copy, so that what is newer at the URL may replace what is in it."""
        with lock(self.folder, _COPY_LOCK):
            self._claim()

    def _claim(self) -> None:
        if not self._is_claimed():
            write_atomically(self.folder / COPY_NAME, json.dumps({"url": self.store.url}).encode("ascii"))

    def _is_claimed(self) -> bool:
        return copied_from(self.folder) == self.store.url

    def _bring(self, name: str, sha256: str | None, largest_bytes: int) -> None:
        path = self.folder / name
        if sha256 is not None and path.is_file() and not path.is_symlink() and sha256_of_file(path) == sha256:
            return
        found = self.store.look(name)
        if found is None or found.num_bytes > largest_bytes:
            what = "is missing" if found is None else f"found {found.num_bytes} bytes, expected at most {largest_bytes}"
            raise CacheCorruptError(f"{self.store.url}/{name}: {what}; upload it again, or run `tristill dump-logits`")
        with atomic_file(path) as file:
            self.store.fetch(name, found.num_bytes, sha256, file)

    def _found_there(self) -> str:
        found = self.store.list(RECORDS_FOLDER)
        return f"found an unfinished cache of {len(found)} shards" if found else "found no cache"

    def _tell_if_narrow(self, sizes: list[int]) -> None:
        side_by_side = min(sum(sizes), _SIDE_BY_SIDE * max(sizes, default=0))
        if not self._is_told and self.local_bytes is not None and self.local_bytes < side_by_side:
            self._is_told = True
            self._tell(
                f"{self.store.url}: cache.local_bytes {self.local_bytes:,} is less than the {side_by_side:,} bytes of "
                "shards that are read side by side, so shards will be fetched several times an epoch"
            )


def keep_copy(
    folder: Path,
    url: str | None,
    local_bytes: int | None,
    tell: Callable[[str], object],
    patience: Patience | None = None,
) -> None:
    """From now on `folder` is the local copy of the cache at a URL (None: a cache of its own), in this process."""
    known = remote_copy(folder)
    if url is None:
        set_copy(folder, None)
    elif known is None or (known.store.url, known.local_bytes) != (url.rstrip("/"), local_bytes):
        set_copy(folder, CacheCopy(folder, url, local_bytes, tell, patience))


def named_place(folder: Path) -> str:
    """Where a cache is, for people: its URL, or its folder."""
    copy = remote_copy(folder)
    return copy.store.url if copy else str(folder)


def copied_from(folder: Path) -> str | None:
    """The URL that a folder says it is a copy of; that is believed in messages alone."""
    try:
        found = parsed_json(read_file(folder / COPY_NAME))
    except (OSError, ValueError):
        return None
    return str(found.get("url")) if isinstance(found, dict) else None


def remote_copy(folder: Path) -> CacheCopy | None:
    """What a folder is the copy of, None if it is a cache of its own."""
    found = copy_in(folder)
    assert found is None or isinstance(found, CacheCopy), "keep_copy alone says what is a copy"
    return found
