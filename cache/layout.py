"""Which windows stand in which shard, and what shards are called."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from tristill.cache.spec import CacheSpec, SplitName

MANIFEST_NAME = "cache.json"
TOKENIZER_NAME = "tokenizer.json"
TABLES_NAME = "tables.h5"
CompanionName = Literal[
    "chat_template.jinja", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"
]
COMPANION_NAMES: tuple[CompanionName, ...] = get_args(CompanionName)
"""Files that go with a tokenizer: special tokens, chat template, when and how to generate. Each may be absent."""
LARGEST_COMPANION_BYTES = 2**24
_POSITIONS_PER_CHUNK = 8192
DEFAULT_SHARD_POSITIONS = 2**17
SHARD_NAME = re.compile(r"^(train|validation|test)-[0-9]{5,}\.h5$")


@dataclass(frozen=True, slots=True)
class ShardRange:
    """Consecutive windows of one split that make up one shard."""

    split: SplitName
    index: int
    first_window: int
    num_windows: int

    @property
    def name(self) -> str:
        """File name of the shard."""
        return f"{self.split}-{self.index:05d}.h5"

    def num_chunks(self, spec: CacheSpec) -> int:
        """Chunks of every dataset; the last one may be padded."""
        return -(-self.num_windows // spec.windows_per_chunk)


def shard_ranges(spec: CacheSpec) -> Iterator[ShardRange]:
    """All shards of a cache, in the order of the manifest: by split name, then by first window."""
    for split in sorted(spec.splits):
        num_windows = spec.splits[split].num_windows
        for index, first in enumerate(range(0, num_windows, spec.windows_per_shard)):
            yield ShardRange(split, index, first, min(spec.windows_per_shard, num_windows - first))


def num_shards(spec: CacheSpec) -> int:
    """How many there are, by arithmetic: a hostile spec may declare more than memory has room to list."""
    return sum(-(-split.num_windows // spec.windows_per_shard) for split in spec.splits.values())


def default_windows_per_chunk(context_length: int) -> int:
    """Windows that make up about 8192 positions: enough to compress well, few enough to shuffle finely."""
    return max(1, _POSITIONS_PER_CHUNK // context_length)


def windows_per_shard(context_length: int, shard_positions: int) -> int:
    """Windows of a shard of about so many positions: whole chunks of default size."""
    per_chunk = default_windows_per_chunk(context_length)
    return max(1, round(shard_positions / (per_chunk * context_length))) * per_chunk
