"""What is on disk: windows of token ids with what the teacher knew about them. Knows nothing of models.

The format is docs/format.md. All that stage two needs is here. The dump and the pipeline also use `layout`, `manifest`
and `spec`, and the small tools `atomic`, `hashing`, `arrays` and `order`; `shard` is private.
"""

from tristill.cache.errors import (
    CacheCorruptError,
    CacheError,
    CacheMismatchError,
    CacheMissingError,
    CacheRequestError,
    CacheStoreError,
    CacheWriteError,
)
from tristill.cache.hidden import (
    CodedLayer,
    Float16Hidden,
    Float32Hidden,
    HiddenSpec,
    Int8Hidden,
    Reduction,
    TransformHidden,
)
from tristill.cache.profiles.dense import DenseProfile
from tristill.cache.profiles.plain_topk import PlainTopKProfile
from tristill.cache.profiles.profile import Need
from tristill.cache.profiles.sampled import SampledProfile
from tristill.cache.profiles.topk import TopKProfile
from tristill.cache.profiles.transform import TransformProfile
from tristill.cache.reader import Cache, WindowBatch, open_cache
from tristill.cache.spec import CacheSpec, SplitName, SplitSpec
from tristill.cache.verify import verify_cache
from tristill.cache.writer import CacheWriter

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
