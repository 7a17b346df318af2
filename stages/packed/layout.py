"""A ternary matrix in memory: four trits to a byte.

Shapes: O rows (outputs), I columns (inputs), R is O or 1, G groups of I / G neighbouring columns, N bytes of a packed
row.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from tristill.stages.quantize.quantizer import TernaryWeight

TRITS_PER_BYTE = 4
_TAIL_BYTES = 4


@dataclass(frozen=True)
class PackedWeight:
    """W = scale * trits, column by column.

    Row i of `rows_IN` is column i of W. Its byte b holds trit + 1 of outputs 4b .. 4b + 3, the first in the lowest two
    bits; outputs past the last are zeros (code 1). After ceil(O / 4) such bytes come the float16 numbers 1 and -1,
    little-endian: with them a row is what torch calls a 2-bit row with scale and offset, value = 1 * code - 1, and its
    operators read it as it lies. That is 2 bits a weight and 4 bytes a column.
    """

    rows_IN: Tensor
    """uint8, (I, ceil(O / 4) + 4)."""
    scale_RG: Tensor
    """As in TernaryWeight."""
    num_outputs: int
    """O."""

    @property
    def num_inputs(self) -> int:
        """I."""
        return len(self.rows_IN)

    @property
    def num_groups(self) -> int:
        """G."""
        return self.scale_RG.shape[1]

    def trits(self, inputs: range, outputs: range) -> Tensor:
        """The trits of neighbouring inputs and outputs, transposed, int8: their numbers are those of its two sizes.

        The first output is a multiple of 4.
        """
        assert outputs.start % TRITS_PER_BYTE == 0, "the caller cuts between bytes"
        last_byte = -(-outputs.stop // TRITS_PER_BYTE)
        codes = self.rows_IN[inputs.start : inputs.stop, outputs.start // TRITS_PER_BYTE : last_byte]
        words = _trits_of_bytes().index_select(0, codes.reshape(-1).int())
        return words.view(torch.int8).view(len(inputs), -1)[:, : len(outputs)].contiguous()


def pack(weight: TernaryWeight) -> PackedWeight:
    """The same matrix, packed."""
    num_outputs, num_inputs = weight.trits_OI.shape
    codes_IO = F.pad(weight.trits_OI.T + 1, (0, -num_outputs % TRITS_PER_BYTE), value=1).to(torch.uint8)
    codes = codes_IO.reshape(num_inputs, -1, TRITS_PER_BYTE)
    packed = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    tail = torch.tensor([1.0, -1.0], dtype=torch.float16).view(torch.uint8).expand(num_inputs, _TAIL_BYTES)
    return PackedWeight(torch.cat([packed, tail], dim=1), weight.scale_RG.clone(), num_outputs)


def unpack(packed: PackedWeight) -> TernaryWeight:
    """The matrix that was packed."""
    trits_IO = packed.trits(range(packed.num_inputs), range(packed.num_outputs))
    return TernaryWeight(trits_IO.T.contiguous(), packed.scale_RG)


@cache
def _trits_of_bytes() -> Tensor:
    """By byte, its four trits as the four bytes of an int32."""
    shifts = torch.arange(0, 2 * TRITS_PER_BYTE, 2)
    trits = (torch.arange(256)[:, None] >> shifts & 3) - 1
    return trits.to(torch.int8).view(torch.int32)[:, 0].contiguous()
