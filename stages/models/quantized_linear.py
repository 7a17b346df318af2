"""Quantised weights with 8-bit activations: linear layers (BitLinear), and the base of stacks of experts."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tristill.stages.errors import StageError
from tristill.stages.quantize.activations import (
    ActivationCodes,
    absmax_codes,
    absmax_quantize,
    integer_product,
    multiplies_integers,
)
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.quantize.gradients import straight_through
from tristill.stages.quantize.quantizer import TernaryWeight


@dataclass(frozen=True)
class Quantized:
    """What was made of the weights when they were last changed."""

    made_of: tuple[int, ...]
    values_OI: Tensor
    ternary: TernaryWeight | None
    rounded: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def in_dtype(self, dtype: torch.dtype) -> Tensor:
        """values_OI in the dtype that products are computed in."""
        if dtype not in self.rounded:
            self.rounded[dtype] = self.values_OI.to(dtype)
        return self.rounded[dtype]


class QuantizedWeight(nn.Module):
    """A latent weight in full precision, its quantised values, and straight-through gradients.

    With `strength` lambda below 1, quantisation being turned on, inputs and weights are x + lambda (Q(x) - x).

    Weights are quantised when they have changed, which is once per optimizer step, and not at every use.

    `log_step` is there for weights of a learned step size only, one number per matrix or per row: step = exp(log_step)
    is positive by construction, and a step of AdamW, which is as large as the learning rate, changes it by a fraction
    of itself. (Jain et al. 2020, arXiv 1903.08066, appendix B, learn logarithms of thresholds for these reasons.)
    """

    quantize: QuantizeConfig
    log_step: nn.Parameter | None
    strength: float
    _quantized: Quantized | None

    def start_quantizing(self, quantize: QuantizeConfig) -> None:
        """Set what is beside the weight, once that is there."""
        self.quantize = quantize
        matrices = self.matrices()
        steps = matrices.shape[:-1] if quantize.scale_per == "row" else matrices.shape[:-2]
        self.log_step = nn.Parameter(matrices.new_zeros(steps)) if quantize.has_learned_step else None
        self.strength = 1.0
        self._quantized = None
        self.fit_step()

    @property
    def latent(self) -> Tensor:
        """The parameter."""
        raise NotImplementedError

    def matrices(self) -> Tensor:
        """The parameter as (out, in), or as a stack of such matrices: what is quantised."""
        return self.latent

    def as_parameter(self, matrices: Tensor) -> Tensor:
        """Inverse of `matrices`: of the parameter's own shape."""
        return matrices

    @property
    def num_scales(self) -> int:
        """Scales of all its matrices; none in full precision."""
        *stack, rows, columns = self.matrices().shape
        quantizer = self.quantize.quantizer
        return 0 if quantizer is None else math.prod(stack) * quantizer.num_scales(rows, columns)

    @torch.no_grad()
    def fit_step(self) -> None:
        """Set the learned step, if there is one, to its initial value for the weights that are here now."""
        if self.log_step is not None and self.quantize.quantizer is not None:
            first_R1 = self.quantize.quantizer.initial_step(self.matrices())
            self.log_step.copy_(first_R1.log().reshape(self.log_step.shape))

    def ternary(self) -> TernaryWeight:
        """Trits and scales of the weights that are here now, with no gradient; of a ternary code only."""
        found = self._current().ternary
        assert found is not None, f"{self.quantize.weights} is not ternary"
        return found

    def quantized_weight(self) -> Tensor:
        """Q_w(W), differentiable, of the parameter's shape and dtype: what the layer multiplies by."""
        quantizer = self.quantize.quantizer
        if quantizer is None:
            return self.latent
        weight_OI = self.matrices()
        quantized_OI = quantizer.with_gradient(weight_OI, self._current().values_OI, self._step_R1())
        if self.strength < 1:
            quantized_OI = torch.lerp(weight_OI, quantized_OI, self.strength)
        return self.as_parameter(quantized_OI)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Q_a(x), differentiable."""
        if self.quantize.activations == "none":
            return x
        quantized = straight_through(x, absmax_quantize(x))
        return quantized if self.strength == 1 else torch.lerp(x, quantized, self.strength)

    def _current(self) -> Quantized:
        """The weights quantised; in a compiled graph, which cannot look for changes, as `refresh` left them."""
        if not torch.compiler.is_compiling():
            self.refresh()
        assert self._quantized is not None, "refreshed before a graph that was compiled runs"
        return self._quantized

    @torch.inference_mode(mode=False)  # training may follow, which cannot use what is made in that mode
    @torch.no_grad()
    def refresh(self) -> None:
        """Quantise the weights again if they or the step were written to since the last time."""
        quantizer = self.quantize.quantizer
        if quantizer is None:
            return
        sources = [self.latent] if self.log_step is None else [self.latent, self.log_step]
        made_of = tuple(number for source in sources for number in (source.data_ptr(), _num_writes(source)))
        if self._quantized is None or self._quantized.made_of != made_of:
            quantized = quantizer.quantize(self.matrices(), self._step_R1())
            ternary = quantized if isinstance(quantized, TernaryWeight) else None
            values_OI = quantized.dequantized() if isinstance(quantized, TernaryWeight) else quantized
            self._quantized = Quantized(made_of, values_OI, ternary)

    def forget(self) -> None:
        """Quantise the weights again at the next use: for changes that torch does not count as a write."""
        self._quantized = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of every module: a move to another device or dtype, which torch does not count as a write."""
        self.forget()
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def _step_R1(self) -> Tensor | None:  # noqa: N802 - shape suffix
        return None if self.log_step is None else self.log_step.exp().reshape(*self.matrices().shape[:-2], -1, 1)


def _num_writes(tensor: Tensor) -> int:
    """How often torch counted a write to its memory; see torch.autograd.graph.increment_version."""
    return tensor._version  # noqa: SLF001 - the name under which torch documents it


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
