"""A linear layer whose only weight is packed."""

from torch import Tensor, nn

from tristill.stages.packed.layout import PackedWeight, pack
from tristill.stages.packed.product import packed_product
from tristill.stages.quantize.activations import absmax_codes
from tristill.stages.quantize.quantizer import TernaryWeight


class PackedLinear(nn.Module):
    """y = Q_a(x) W^T as QuantizedLinear computes it, on the CPU, with no gradient; see PackedWeight for what is kept.

    With 8-bit activations the product is one of whole numbers, exact, and the scales of weights and position follow it:
    y is QuantizedLinear's bit for bit, or, with scales per group, differs by rounding alone.
    """

    rows_IN: Tensor
    scale_RG: Tensor

    def __init__(self, weight: TernaryWeight, *, has_int8_activations: bool) -> None:
        super().__init__()
        packed = pack(weight)
        self.out_features, self.in_features = weight.trits_OI.shape
        self.has_int8_activations = has_int8_activations
        self.register_buffer("rows_IN", packed.rows_IN)
        self.register_buffer("scale_RG", packed.scale_RG)

    @property
    def packed(self) -> PackedWeight:
        """The weight."""
        return PackedWeight(self.rows_IN, self.scale_RG, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), of x's dtype, computed in float32."""
        x_TI = x.reshape(-1, self.in_features)
        if self.has_int8_activations:
            codes_TI, step_T1 = absmax_codes(x_TI)
            y_TO = packed_product(codes_TI, self.packed, step_T1)
        else:
            y_TO = packed_product(x_TI.float(), self.packed)
        return y_TO.view(*x.shape[:-1], self.out_features).to(x.dtype)
