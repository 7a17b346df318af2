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
    CacheStoreError,
    CacheWriteError,
)
from cache.hidden import CodedLayer, Float16Hidden, Float32Hidden, HiddenSpec, Int8Hidden, Reduction, TransformHidden
from cache.profiles.dense import DenseProfile
from cache.profiles.plain_topk import PlainTopKProfile
from cache.profiles.profile import Need
from cache.profiles.sampled import SampledProfile
from cache.profiles.topk import TopKProfile
from cache.profiles.transform import TransformProfile
from cache.reader import Cache, WindowBatch, open_cache
from cache.spec import CacheSpec, SplitName, SplitSpec
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
    "CacheStoreError",
    "CacheWriteError",
    "CacheWriter",
    "CodedLayer",
    "DenseProfile",
    "Float16Hidden",
    "Float32Hidden",
    "HiddenSpec",
    "Int8Hidden",
    "Need",
    "PlainTopKProfile",
    "Reduction",
    "SampledProfile",
    "SplitName",
    "SplitSpec",
    "TopKProfile",
    "TransformHidden",
    "TransformProfile",
    "WindowBatch",
    "open_cache",
    "verify_cache",
]
