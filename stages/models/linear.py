"""Linear layers with quantised weights and 8-bit activations (BitLinear)."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tristill.stages.errors import StageError
from tristill.stages.models.quantized_weight import QuantizedWeight
from tristill.stages.quantize.absmax import ActivationCodes, absmax_codes
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.quantize.integer_product import integer_product, multiplies_integers


class QuantizedLinear(QuantizedWeight, nn.Linear):
    """y = Q_a(x) Q_w(W)^T, plus a bias in full precision if there is one, with straight-through gradients.

    The latent weight W stays in full precision.

    Wang et al. 2023, BitNet (arXiv 2310.11453) and Ma et al. 2024 (arXiv 2402.17764). The norm that those papers put
    inside the layer is the block's own RMSNorm, and SubLN where it is configured.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantize: QuantizeConfig,
        weight: Tensor | None = None,
        bias: nn.Parameter | None = None,
    ) -> None:
        """With `weight`, (out_features, in_features), the layer has that one, which it may share; so with `bias`."""
        nn.Linear.__init__(
            self, in_features, out_features, bias=False, device=None if weight is None else torch.device("meta")
        )
        if weight is not None:
            self.weight = weight
        self.register_parameter("bias", bias)
        self.start_quantizing(quantize)

    @property
    def latent(self) -> Tensor:
        """The weight, (O, I)."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.multiply(x, self.codes_of(x))

    def codes_of(self, x: Tensor) -> ActivationCodes | None:
        """The codes of x, if the layer multiplies integers."""
        if self.quantize.activations == "none" or not self.quantize.is_ternary or self.strength < 1:
            return None
        return absmax_codes(x) if multiplies_integers(x, self.ternary()) else None

    def multiply(self, x: Tensor, codes: ActivationCodes | None) -> Tensor:
        """As forward, with codes of x that are shared by layers of which integers may not serve all."""
        if codes is None or not multiplies_integers(x, self.ternary()):
            return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        values_OI = self._current().in_dtype(dtype)
        product = integer_product(x, codes, self.quantized_weight(), self.ternary(), values_OI)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Every layer's product with the same x, whose 8-bit codes are made once."""
    codes = next((layer.codes_of(x) for layer in layers if isinstance(layer, QuantizedLinear)), None)
    return [layer.multiply(x, codes) if isinstance(layer, QuantizedLinear) else layer(x) for layer in layers]


def quantize_linears(model: nn.Module, quantize: QuantizeConfig) -> None:
    """Replace the linear layers that the config names, in place; their weights remain. See replace_linears."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    require_fit(quantize, {name: (linear.out_features, linear.in_features) for name, linear in linears.items()})
    replace_linears(model, linears, quantize)


def linears_of(model: nn.Module, forward: Callable[[], Any]) -> dict[str, nn.Linear]:
    """The modules that compute x W^T + b and nothing else, by name; those of their own class show it in `forward`."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    others = {module: name for name, module in found.items() if type(module) is not nn.Linear}
    if not others:
        return found
    proven: dict[nn.Module, bool] = {}

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert isinstance(module, nn.Linear), "hooks are on no other"
        x = args[0] if len(args) == 1 else None
        if isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape[-1] == module.in_features:
            expected = nn.Linear.forward(module, x)
            proven[module] = output.shape == expected.shape and torch.allclose(output, expected, 1e-3, 1e-3)

    with ExitStack() as hooks:
        for module in others:
            hooks.callback(module.register_forward_hook(look).remove)
        forward()
    return {name: module for name, module in found.items() if module not in others or proven.get(module, False)}


def require_fit(quantize: QuantizeConfig, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises StageError for a pattern that names none of these matrices, (out, in), and for rows that no groups fit."""
    if problems := quantize.misfits(shapes):
        raise StageError("; ".join(f"student.quantize.{problem}" for problem in problems))


def replace_linears(model: nn.Module, linears: Mapping[str, nn.Linear], quantize: QuantizeConfig) -> None:
    """Put quantised layers in the place of those of these that the config names, with the same weights and biases."""
    for name, linear in linears.items():
        if quantize.covers(name):
            quantized = QuantizedLinear(linear.in_features, linear.out_features, quantize, linear.weight, linear.bias)
            model.set_submodule(name, quantized)
