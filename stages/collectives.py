"""Tensors and numbers of all ranks put together. Every rank must call these, and gets the same bits.

Alone they give back what they are given, and exchange nothing.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from tristill.stages.ranks import Ranks


def summed(values: Tensor, ranks: Ranks) -> Tensor:
    """The sum over ranks of tensors of one shape, without gradient."""
    if not ranks.are_many:
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def stacked(values: Tensor, ranks: Ranks) -> Tensor:
    """Tensors of one shape, in the order of ranks along a new first dimension; without gradient."""
    if not ranks.are_many:
        return values.detach()[None]
    found = [torch.empty_like(values) for _ in range(ranks.world_size)]
    dist.all_gather(found, values.detach().contiguous())
    return torch.stack(found)


def sum_of(number: float, ranks: Ranks) -> float:
    """The sum over ranks of a number of the processor, whatever the device computes on."""
    return float(summed(torch.tensor(number, dtype=torch.float64), ranks)) if ranks.are_many else number


def means_of(values: Mapping[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """The means over ranks of scalars, by name; the names are the same on all."""
    if not ranks.are_many or not values:
        return {name: float(value) for name, value in values.items()}
    means = summed(torch.stack([value.float() for value in values.values()]), ranks) / ranks.world_size
    return dict(zip(values, means.tolist(), strict=True))
