"""Files at a URL, through fsspec: reads are bounded, and what fails on the way is tried again, with bounds."""

import errno
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from tristill.cache.errors import CacheCorruptError, CacheRequestError, CacheStoreError
from tristill.cache.secrets import NO_CREDENTIALS, masked

_BLOCK_BYTES = 8 * 2**20
"""Of one request: what is read again after a failure, and what a reader holds in memory."""
_WRONG_CONTENTS = 3
"""How often a file may arrive with another SHA-256 before it counts as damaged at the URL."""
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "content_md5", "blob_id", "mtime", "created", "LastModified")
_NEVER_AGAIN = (
    PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError,
    TypeError, ValueError, AttributeError,
)  # fmt: skip
_NEVER_AGAIN_ERRNO = {errno.EINVAL, errno.EPERM, errno.ENOSPC, errno.EROFS}
_NEVER_AGAIN_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"}
_MAY_SUCCEED_LATER = {408, 425, 429}
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a store is waited for, and how often it is asked again.

    A request may take timeout_s, and a second for every slowest_bytes_per_s. After a failure comes a pause of
    first_pause_s, doubled with each further one up to longest_pause_s, times a random number from 0.5 to 1. The last of
    `attempts` is final, and so is one that fails later than total_s after the first began.
    """

    attempts: int = 8
    first_pause_s: float = 0.25
    longest_pause_s: float = 20.0
    timeout_s: float = 60.0
    slowest_bytes_per_s: int = 2**18
    total_s: float = 600.0

    def pause_s(self, failures: int, generator: random.Random) -> float:
        """The pause after so many failures."""
        return min(self.longest_pause_s, self.first_pause_s * 2.0 ** (failures - 1)) * generator.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What a store says of a file. version: changes with the content, as far as the store tells; else empty."""

    num_bytes: int
    version: str


def check_url(url: str) -> str:
    """The URL itself. Raises ValueError for one without a scheme, with a secret in it, or of several parts."""
    parts = urlsplit(url)
    if "://" not in url or not parts.scheme or "::" in url:
        raise ValueError("expected one URL such as s3://bucket/folder")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(NO_CREDENTIALS)
    return url


class Store:
    """A folder at a URL, as fsspec sees it. Safe to use from several threads."""

    def __init__(self, url: str, tell: Callable[[str], object], patience: Patience | None = None) -> None:
        """`tell` is given one line for every failure that is followed by another attempt."""
        self.url = url.rstrip("/")
        self.patience = patience or Patience()
        self._tell = tell
        self._random = random.Random(f"{url} {os.getpid()}")  # noqa: S311 - pauses of processes shall differ
        self._opened: tuple[Any, str] | None = None

    def look(self, name: str) -> StoredFile | None:
        """What the store says of a file; None if it is not there."""
        try:
            return _stored(self._tried("looked at", name, lambda: self._call("info", self._path(name))))
        except FileNotFoundError:
            return None

    def list(self, folder: str = "") -> dict[str, StoredFile]:
        """The files that lie directly in the folder, or in one within it, by name; empty if it is not there."""
        try:
            found = self._tried("listed", folder, lambda: self._call("ls", self._path(folder), detail=True))
        except FileNotFoundError:
            return {}
        return {PurePosixPath(one["name"]).name: _stored(one) for one in found if one["type"] == "file"}

    def matching(self, path: str) -> dict[str, StoredFile]:
        """The files that a path below the URL leads to, by URL: itself, all in a folder, or those of a glob."""
        place = self._path(path)
        own = self.look(path)
        if own is not None and own.num_bytes:
            return {self._system()[0].unstrip_protocol(place): own}
        method = "glob" if any(sign in path for sign in "*?[") else "find"
        found = self._tried("searched", path, lambda: self._listed(method, place))
        system, _ = self._system()
        return {system.unstrip_protocol(name): _stored(one) for name, one in found.items() if one.get("type") == "file"}

    def _listed(self, method: str, place: str) -> dict[str, Any]:
        """All that `find` or `glob` lists. Folders that cannot be listed are an error, which fsspec leaves out else."""
        try:
            found = self._call(method, place, detail=True, on_error="raise")
        except TypeError:  # a file system that lists a whole tree in one request, which raises by itself
            found = self._call(method, place, detail=True)
        return dict(found)

    def read(self, name: str, largest_bytes: int) -> bytes | None:
        """A whole file, None if it is not there. Raises CacheCorruptError if it is larger."""
        found = self.look(name)
        if found is None:
            return None
        if found.num_bytes > largest_bytes:
            raise CacheCorruptError(
                f"{self._named(name)}: found {found.num_bytes} bytes, expected at most {largest_bytes}"
            )
        return b"".join(self._blocks(name, found.num_bytes))

    def fetch(self, name: str, num_bytes: int, sha256: str | None, file: BinaryIO) -> None:
        """Write a file of so many bytes to the start of `file`, which is open for nothing else.

        Content with another SHA-256 is fetched again, a few times. Raises CacheCorruptError if it stays so.
        """
        for failures in range(1, _WRONG_CONTENTS + 1):
            file.seek(0)
            digest = hashlib.sha256()
            for block in self._blocks(name, num_bytes):
                digest.update(block)
                file.write(block)
            found = digest.hexdigest()
            if sha256 in (None, found):
                file.truncate(num_bytes)
                return
            if failures < _WRONG_CONTENTS:
                self._pause(name, failures, f"found SHA-256 {found[:12]}, expected {(sha256 or '')[:12]}")
        raise CacheCorruptError(
            f"{self._named(name)}: fetched {_WRONG_CONTENTS} times, and its SHA-256 was not {sha256} as the manifest "
            f"says, the last time {found}; the file is damaged there: delete it and run `tristill dump-logits`, which "
            "writes only what is missing, or upload it again from a good copy"
        )

    def write(self, name: str, content: bytes) -> StoredFile:
        """Put a file there, and check that it arrived: by its MD5 where the store tells it, else by reading it back."""

        def put() -> StoredFile:
            self._call("pipe_file", self._path(name), content, num_bytes=len(content))
            stored = _stored(self._call("info", self._path(name)))
            if stored.num_bytes != len(content):
                raise OSError(errno.EIO, f"found {stored.num_bytes} bytes there, expected {len(content)}")
            if stored.version.strip('"') != hashlib.md5(content, usedforsecurity=False).hexdigest():
                back = self._call("cat_file", self._path(name), num_bytes=len(content))
                if back != content:
                    raise OSError(errno.EIO, "what was read back differs from what was sent")
            return stored

        return self._tried("written", name, put)

    def _blocks(self, name: str, num_bytes: int) -> Iterator[bytes]:
        for start in range(0, num_bytes, _BLOCK_BYTES):
            yield self._block(name, start, min(start + _BLOCK_BYTES, num_bytes))

    def _block(self, name: str, start: int, end: int) -> bytes:
        def get() -> bytes:
            content = self._call("cat_file", self._path(name), start=start, end=end, num_bytes=end - start)
            if len(content) != end - start:
                raise OSError(errno.EIO, f"found {len(content)} bytes from {start} on, expected {end - start}")
            return bytes(content)

        try:
            return self._tried("read", name, get)
        except FileNotFoundError as exc:
            raise CacheCorruptError(
                f"{self._named(name)}: is missing there; run `tristill dump-logits`, which writes only what is missing"
            ) from exc

    def _tried(self, what: str, name: str, call: Callable[[], _Result]) -> _Result:
        started = time.monotonic()
        failures = 0
        while True:
            try:
                return call()
            except (FileNotFoundError, CacheRequestError):
                raise
            except Exception as exc:  # every file system has kinds of its own
                failures += 1
                elapsed_s = time.monotonic() - started
                is_last = failures >= self.patience.attempts or elapsed_s > self.patience.total_s
                if is_last or is_final(exc):
                    raise CacheStoreError(
                        f"{self._named(name)}: could not be {what}, tried {failures} times in {elapsed_s:.0f} s; the "
                        f"last time {_said(exc)}; check the URL, the network and the credentials in the environment "
                        "(docs/remote.md), then run the same command again"
                    ) from exc
                problem = _said(exc)
            self._pause(name, failures, problem)

    def _pause(self, name: str, failures: int, problem: str) -> None:
        pause_s = self.patience.pause_s(failures, self._random)
        self._tell(f"{self._named(name)}: {problem}; again in {pause_s:.1f} s ({failures} failed)")
        time.sleep(pause_s)

    def _call(self, method: str, *arguments: Any, num_bytes: int = 0, **options: Any) -> Any:
        """One request, bounded in time where the file system can be interrupted."""
        system, _ = self._system()
        if not system.async_impl:
            return getattr(system, method)(*arguments, **options)
        from fsspec.asyn import sync

        timeout_s = self.patience.timeout_s + num_bytes / self.patience.slowest_bytes_per_s
        return sync(system.loop, getattr(system, f"_{method}"), *arguments, timeout=timeout_s, **options)

    def _path(self, name: str) -> str:
        _, root = self._system()
        return f"{root}/{name}" if name else root

    def _named(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _system(self) -> tuple[Any, str]:
        if self._opened is None:
            self._opened = _open_system(self.url, self.patience)
        return self._opened


def is_final(problem: BaseException) -> bool:
    """Whether another attempt can only fail the same way."""
    if isinstance(problem, TimeoutError | ConnectionError):
        return False
    status = getattr(problem, "status", getattr(problem, "code", None))
    if isinstance(status, int) and 400 <= status < 500:
        return status not in _MAY_SUCCEED_LATER
    if isinstance(problem, OSError) and problem.errno in _NEVER_AGAIN_ERRNO:
        return True
    return isinstance(problem, _NEVER_AGAIN) or type(problem).__name__ in _NEVER_AGAIN_NAMES


def _open_system(url: str, patience: Patience) -> tuple[Any, str]:
    import fsspec

    scheme = url.split("://", maxsplit=1)[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in {"file", "local"}:
        options["auto_mkdir"] = True
    if scheme in {"s3", "s3a"}:
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        ours = {"connect_timeout": patience.timeout_s, "read_timeout": patience.timeout_s}
        options["config_kwargs"] = {**ours, "retries": {"total_max_attempts": 1}, **given}
    try:
        system, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as exc:
        raise CacheRequestError(
            f"{url}: what reads {scheme}:// is not installed ({exc}); for s3:// install this project with its extra "
            "`remote`, for others that package"
        ) from exc
    except ValueError as exc:
        raise CacheRequestError(f"{url}: fsspec knows no such place ({exc})") from exc
    if scheme in {"s3", "s3a"}:
        system.retries = 1  # ours are counted, and said
        system.connect()  # takes a second or more, which is no request's
    return system, str(root).rstrip("/")


def _stored(found: dict[str, Any]) -> StoredFile:
    version = next((str(found[key]) for key in _VERSIONS if found.get(key)), "")
    return StoredFile(int(found["size"] or 0), version)


def _said(problem: BaseException) -> str:
    text = masked(re.sub(r"\s+", " ", str(problem)).strip())[:200]
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__
