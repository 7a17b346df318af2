"""The processes that work on one step together: started by torchrun, or one alone.

What ranks tell each other goes as JSON through tensors, so nothing is unpickled here either.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_PATIENCE = timedelta(hours=24)
"""How long a rank waits for the others: a step of the first one alone may take long; torchrun ends all if one dies."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that work on a step. local_rank counts those of this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that speaks to the user and keeps the records."""
        return self.rank == 0

    @property
    def are_many(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

    def gathered(self, value: Any) -> list[Any]:
        """What every rank gave here, in the order of ranks; anything that JSON holds. All ranks must call it."""
        if not self.are_many:
            return [value]
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(json.dumps(value).encode("ascii")), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        found = [torch.zeros_like(padded) for _ in range(self.world_size)]
        dist.all_gather(found, padded)
        pairs = zip(found, sizes, strict=True)
        return [json.loads(bytes(content[: int(size)].numpy())) for content, size in pairs]

    def from_first(self, value: Any = None) -> Any:
        """What the first rank gave here, on every rank; anything that JSON holds. All ranks must call it."""
        return self.gathered(value if self.is_first else None)[0]

    def wait_for_all(self) -> None:
        """Return once every rank is here."""
        self.gathered(None)


ALONE = Ranks()


def current_ranks() -> Ranks:
    """This process among those of the group that `joined_ranks` opened; alone where there is none."""
    if not _many_are_announced():
        return ALONE
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started (it says so in the environment); alone without it.

    Tensors on the CPU are exchanged by gloo, those on CUDA by NCCL.
    """
    if not _many_are_announced():
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        yield current_ranks()
    finally:
        dist.destroy_process_group()


def _many_are_announced() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
