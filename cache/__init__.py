"""What is on disk: windows of token ids with what the teacher knew about them. Knows nothing of models.

The format is docs/format.md. All that stage two needs is here. The dump and the pipeline also use `layout`, `manifest`
and `spec`, and the small tools `atomic`, `hashing`, `arrays` and `order`; `shard` is private.
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
