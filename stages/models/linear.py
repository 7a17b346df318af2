"""The linear layers of the blocks: full precision, or quantised weights with 8-bit activations (BitLinear)."""

from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from stages.quantize.absmax import absmax_quantize
from stages.quantize.absmean import absmean_quantize
from stages.quantize.config import QuantizeConfig
from stages.quantize.learned import initial_step, learned_quantize
from stages.quantize.nbit import nbit_quantize
from stages.quantize.straight_through import straight_through


class QuantizedLinear(nn.Linear):
    """y = Q_a(x) Q_w(W)^T without bias; the latent weight W stays in full precision, with straight-through gradients.

    Wang et al. 2023, BitNet (arXiv 2310.11453) and Ma et al. 2024 (arXiv 2402.17764). The norm that those papers put
    inside the layer is the block's own RMSNorm, and SubLN where it is configured.

    `log_step` is there for weights of a learned step size only, a scalar: step = exp(log_step) is positive by
    construction, and a step of AdamW, which is as large as the learning rate, changes it by a fraction of itself. (Jain
    et al. 2020, arXiv 1903.08066, appendix B, learn logarithms of thresholds for these reasons.)
    """

    def __init__(self, in_features: int, out_features: int, quantize: QuantizeConfig) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.quantize = quantize
        self.log_step = nn.Parameter(torch.zeros(())) if quantize.weights == "nbit-learned" else None
        self.fit_step()

    def fit_step(self) -> None:
        """Set the learned step, if there is one, to its initial value for the weights that are here now."""
        if self.log_step is not None:
            with torch.no_grad():
                self.log_step.copy_(initial_step(self.weight, self._bits).log())

    def quantized_weight(self) -> Tensor:
        """Q_w(W), differentiable, of the weight's shape and dtype: what the layer multiplies by."""
        match self.quantize.weights:
            case "absmean":
                return straight_through(self.weight, absmean_quantize)
            case "nbit" | "nbit-diffused" as code:
                quantize = partial(nbit_quantize, bits=self._bits, error_diffusion=code == "nbit-diffused")
                return straight_through(self.weight, quantize)
            case "nbit-learned":
                assert self.log_step is not None, "made with the layer"
                return learned_quantize(self.weight, self.log_step.exp(), self._bits)
            case "none":
                return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.quantize.activations == "absmax-int8":
            x = straight_through(x, absmax_quantize)
        return F.linear(x, self.quantized_weight())

    @property
    def _bits(self) -> int:
        assert self.quantize.bits is not None, "the config refuses an nbit code without bits"
        return self.quantize.bits


def make_linear(in_features: int, out_features: int, quantize: QuantizeConfig | None) -> nn.Linear:
    """A linear layer without bias; quantised if `quantize` is given."""
    if quantize is None:
        return nn.Linear(in_features, out_features, bias=False)
    return QuantizedLinear(in_features, out_features, quantize)
