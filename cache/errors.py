"""What can be wrong with a cache.

CacheError
    CacheMissingError       no cache there, or an unfinished one
    CacheCorruptError       bytes on disk are not what was written, or break the format
    CacheMismatchError      a valid cache, but not the one that is wanted
    CacheRequestError       the cache does not hold, or cannot serve, what was asked of it
    CacheWriteError         the disk did not take the bytes
    CacheStoreError         a URL refused, or did not answer as often as it was asked
"""


class CacheError(Exception):
    """Base of all errors of this package; its text says what was found, expected, where, and what to do."""


class CacheMissingError(CacheError):
    """There is no finished cache in the folder."""


class CacheCorruptError(CacheError):
    """A manifest or a shard is damaged, truncated or breaks docs/format.md."""


class CacheMismatchError(CacheError):
    """The cache is valid but was made from something else than expected."""


class CacheRequestError(CacheError):
    """The cache does not hold, or cannot serve exactly, what was asked of it."""


class CacheWriteError(CacheError):
    """The disk refused bytes; shards that were finished before are safe."""


class CacheStoreError(CacheError):
    """What is at a URL could not be read or written, after all attempts."""
