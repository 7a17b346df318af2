"""The linear layers of the blocks: full precision, or ternary with 8-bit activations (BitLinear)."""

import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from stages.quantize.absmax import absmax_quantize
from stages.quantize.absmean import absmean_quantize
from stages.quantize.config import QuantizeConfig
from stages.quantize.straight_through import straight_through


class QuantizedLinear(nn.Linear):
    """y = Q_a(x) Q_w(W)^T without bias; the latent weight W stays in full precision, with straight-through gradients.

    Wang et al. 2023, BitNet (arXiv 2310.11453) and Ma et al. 2024 (arXiv 2402.17764). The norm that those papers put
    inside the layer is the block's own RMSNorm, and SubLN where it is configured.
    """

    def __init__(self, in_features: int, out_features: int, quantize: QuantizeConfig) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.quantize = quantize

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight = straight_through(self.weight, absmean_quantize) if self.quantize.is_ternary else self.weight
        if self.quantize.activations == "absmax-int8":
            x = straight_through(x, absmax_quantize)
        return F.linear(x, weight)


def make_linear(in_features: int, out_features: int, quantize: QuantizeConfig | None) -> nn.Linear:
    """A linear layer without bias; quantised if `quantize` is given."""
    if quantize is None:
        return nn.Linear(in_features, out_features, bias=False)
    return QuantizedLinear(in_features, out_features, quantize)
