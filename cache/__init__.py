"""What is on disk: windows of token ids with what the teacher knew about them. Knows nothing of models.

The format is docs/format.md. All that reads or writes a cache is here. The modules `atomic`, `hashing` and `order` are
also used by the packages above; the others are private.
"""

from cache.errors import (
    CacheCorruptError,
    CacheError,
    CacheMismatchError,
    CacheMissingError,
    CacheRequestError,
    CacheWriteError,
)
from cache.reader import Cache, WindowBatch, open_cache
from cache.spec import CacheSpec, HiddenSpec, SplitName, SplitSpec
from cache.topk import TopKProfile
from cache.verify import verify_cache
from cache.writer import CacheWriter

__all__ = [
    "Cache",
    "CacheCorruptError",
    "CacheError",
    "CacheMismatchError",
    "CacheMissingError",
    "CacheRequestError",
    "CacheSpec",
    "CacheWriteError",
    "CacheWriter",
    "HiddenSpec",
    "SplitName",
    "SplitSpec",
    "TopKProfile",
    "WindowBatch",
    "open_cache",
    "verify_cache",
]
