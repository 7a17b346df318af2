"""Products with a packed matrix, which is never unpacked as a whole.

Shapes: T positions, O outputs, I inputs, G groups of inputs with a scale of their own, R is O or 1.
"""

from functools import lru_cache

import torch
from torch import Tensor

from tristill.stages.packed.layout import TRITS_PER_BYTE, PackedWeight

_FEW_POSITIONS = 2  # measured: up to here bags are faster, at every width from 256 to 2048
_BLOCK_WEIGHTS = 1 << 20  # unpacked at once, a byte each
_LONGEST_SUM = 1 << 16  # terms of at most 128 * 2 whose partial sums float32 holds exactly


def packed_product(x_TI: Tensor, weight: PackedWeight, step_T1: Tensor | None = None) -> Tensor:
    """x W^T, (T, O) float32, on the CPU; with step_T1, of step * x.

    x is float32, or int8, of which the sums before they are scaled are exact: with scales per matrix or row the result
    is that of `integer_product`, bit for bit.
    """
    if len(x_TI) <= _FEW_POSITIONS and weight.num_inputs <= _LONGEST_SUM and has_bags():
        return product_by_bags(x_TI, weight, step_T1)
    return product_by_blocks(x_TI, weight, step_T1)


def has_bags() -> bool:
    """Whether this build of torch has the operator of `product_by_bags`."""
    return hasattr(torch.ops.quantized, "embedding_bag_2bit_rowwise_offsets")


def product_by_bags(x_TI: Tensor, weight: PackedWeight, step_T1: Tensor | None = None) -> Tensor:
    """As `packed_product`, read straight from the packed bytes: the fastest for a position or two.

    The sum over i of x_i times row i is what torch calls a bag of 2-bit embeddings with weights. A bag is one group of
    one position, cut once more into one part for each thread. Whole numbers are summed exactly: no partial sum of at
    most 65536 terms reaches 2^24.
    """
    num_positions, num_inputs = x_TI.shape
    columns, starts = _bags(num_positions, num_inputs, num_inputs // weight.num_groups, torch.get_num_threads())
    bags: Tensor = torch.ops.quantized.embedding_bag_2bit_rowwise_offsets(
        weight.rows_IN, columns, starts, per_sample_weights=x_TI.float().reshape(-1)
    )
    sums = bags[:, : weight.num_outputs]
    if len(bags) > num_positions:
        sums = sums.view(num_positions, weight.num_groups, -1, weight.num_outputs).sum(2)
        if weight.num_groups > 1:
            summed = (sums * weight.scale_RG.T).sum(1)
            return summed if step_T1 is None else summed * step_T1
        sums = sums[:, 0]
    return _scaled(sums, weight.scale_RG[:, 0], step_T1)


@lru_cache(maxsize=64)
def _bags(num_positions: int, num_inputs: int, group: int, threads: int) -> tuple[Tensor, Tensor]:
    """The column of each weight of all bags, and the first weight of each bag: int32, made once a shape."""
    bag = -(-group // threads)
    starts = torch.arange(0, num_inputs, group, dtype=torch.int32)[:, None]
    starts = (starts + torch.arange(0, group, bag, dtype=torch.int32)).flatten()
    positions = torch.arange(num_positions, dtype=torch.int32)[:, None]
    columns = torch.arange(num_inputs, dtype=torch.int32).repeat(num_positions)
    return columns, (positions * num_inputs + starts).flatten()


def product_by_blocks(
    x_TI: Tensor, weight: PackedWeight, step_T1: Tensor | None = None, *, block_weights: int = _BLOCK_WEIGHTS
) -> Tensor:
    """As `packed_product`, unpacking about `block_weights` at a time: the more positions, the faster each.

    int8 is summed in int32. (On processors without VNNI oneDNN adds pairs of products in 16 bits; with trits these are
    at most 2 * 255.)
    """
    group = weight.num_inputs // weight.num_groups
    is_whole = x_TI.dtype == torch.int8
    parts = [x_TI[:, first : first + group].contiguous() for first in range(0, weight.num_inputs, group)]
    out_TO = torch.empty(len(x_TI), weight.num_outputs)
    step = max(1, block_weights // group // TRITS_PER_BYTE) * TRITS_PER_BYTE
    for first in range(0, weight.num_outputs, step):
        outputs = range(first, min(first + step, weight.num_outputs))
        block = out_TO[:, first : outputs.stop]
        for number, part in enumerate(parts):
            trits = weight.trits(range(number * group, (number + 1) * group), outputs)
            sums = torch._int_mm(part, trits) if is_whole else part @ trits.float()  # noqa: SLF001 - its only name
            scale = weight.scale_RG[:, number]
            scaled = _scaled(sums, scale if len(scale) == 1 else scale[first : outputs.stop], step_T1)
            block.copy_(scaled) if number == 0 else block.add_(scaled)
    return out_TO


def _scaled(sums_TO: Tensor, scale_R: Tensor, step_T1: Tensor | None) -> Tensor:
    """sums * scale * step, in the order of `integer_product`."""
    if step_T1 is None:
        return sums_TO * scale_R
    return sums_TO * (step_T1 * scale_R) if len(scale_R) == 1 else sums_TO * step_T1 * scale_R
