"""One module trained by many ranks: by copies that stay alike (DDP), or with its tensors shared out (FSDP2).

Li et al. 2020, PyTorch Distributed (arXiv 2006.15704); Zhao et al. 2023, PyTorch FSDP (arXiv 2304.11277), as its second
version `fully_shard`, in which each rank holds some rows of every tensor, of its gradient and of AdamW's moments.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tristill.stages.errors import StageError
from tristill.stages.losses.term import LossValues
from tristill.stages.models.quantized_linear import QuantizedWeight
from tristill.stages.ranks import Ranks

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LossFunction = Callable[..., LossValues]


class StepLoss(nn.Module):
    """A module and its loss as one forward pass, whose outputs are containers that torch's wrappers look into."""

    def __init__(self, module: nn.Module, compute_loss: LossFunction) -> None:
        super().__init__()
        self.module = module
        self._compute_loss = compute_loss

    def forward(self, batch: Any, info: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, dict[str, float]]]:
        """Total, terms and telemetry."""
        values = self._compute_loss(batch, info)
        return values.total, values.terms, values.telemetry


def replicated(loss: StepLoss, *, may_idle: bool) -> DistributedDataParallel:
    """The loss with gradients averaged over ranks, in every backward pass that is not within `no_sync`.

    may_idle: whether a pass may leave parameters without gradient. Buffers are left alone: all ranks compute the same.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch has another name for it, older has not
        return DistributedDataParallel(
            loss, broadcast_buffers=False, find_unused_parameters=may_idle, gradient_as_bucket_view=True
        )


def shard(loss: StepLoss, blocks: Sequence[nn.Module], ranks: Ranks) -> None:
    """Share out the tensors of a loss, in place: each block is whole only while it is at work, all else for a step.

    Raises StageError for scalars, which have no rows.
    """
    named = list(loss.module.named_parameters())
    if scalars := [name for name, parameter in named if parameter.requires_grad and parameter.ndim == 0]:
        raise StageError(
            f"training.parallel = 'fsdp': found {len(scalars)} learned numbers without rows to share out (the first is "
            f"{scalars[0]}); set student.quantize.scale_per = 'row', or training.parallel = 'ddp'"
        )
    mesh = init_device_mesh(named[0][1].device.type, (ranks.world_size,))
    for part in (*blocks, loss):
        fully_shard(part, mesh=mesh)
        part.register_forward_hook(_forget)


def _forget(part: nn.Module, *_: Any) -> None:
    """What quantised layers made of weights goes when these go: a whole tensor comes back uncounted, maybe in place."""
    for module in part.modules():
        if isinstance(module, QuantizedWeight):
            module.forget()


@contextmanager
def made_whole(*parts: nn.Module) -> Iterator[None]:
    """Within, parts that are shared out are whole, without the shared parts in them; others are so anyway."""
    shared = [part for part in parts if isinstance(part, FSDPModule)]
    for part in shared:
        part.unshard()
    try:
        yield
    finally:
        for part in shared:
            _forget(part)
            part.reshard()


def without_exchange(loss: nn.Module) -> AbstractContextManager[None]:
    """Within, gradients of copies are added up and not yet averaged; those of shared tensors always are."""
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """The tensor that ranks have parts of, on each of them; all must ask for it. Itself if it is whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_own_row(tensor: DTensor, ranks: Ranks) -> int:
    """Number of this rank's first row: rows are cut as torch.chunk does."""
    rows = len(tensor)
    return min(rows, ranks.rank * -(-rows // ranks.world_size))


def require_alike(module: nn.Module, ranks: Ranks, when: str) -> None:
    """Raise StageError on all ranks unless what each has whole of the module is the same on all, bit for bit."""
    if not ranks.are_many:
        return
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    own = {name: _sum_of_bits(tensor) for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    first, *others = ranks.gathered(own)
    if odd := [
        (name, rank) for rank, other in enumerate(others, start=1) for name in own if other[name] != first[name]
    ]:
        raise StageError(
            f"{when}: found {odd[0][0]} on rank {odd[0][1]} to differ from that on rank 0, expected the same bits on "
            f"all {ranks.world_size} ranks; run them with the same versions on machines of one kind, from the last "
            "checkpoint"
        )


def _sum_of_bits(tensor: Tensor) -> int:
    """Of its elements as integers of their size, modulo 2^64."""
    return int(tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
