"""Linear layers with quantised weights and 8-bit activations (BitLinear)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from stages.errors import StageError
from stages.quantize.absmax import ActivationCodes, absmax_codes, absmax_quantize
from stages.quantize.absmean import absmean_ternary
from stages.quantize.config import QuantizeConfig
from stages.quantize.integer_product import integer_product, multiplies_integers
from stages.quantize.learned import (
    initial_seq_step,
    initial_step,
    learned_quantize,
    learned_ternary,
    seq_ternary,
    through_step,
)
from stages.quantize.nbit import largest_level, nbit_quantize
from stages.quantize.straight_through import straight_through
from stages.quantize.ternary import TernaryWeight
from stages.quantize.twn import twn_ternary


@dataclass(frozen=True)
class _Quantized:
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


class QuantizedLinear(nn.Linear):
    """y = Q_a(x) Q_w(W)^T, plus a bias in full precision if there is one, with straight-through gradients.

    The latent weight W stays in full precision.

    Wang et al. 2023, BitNet (arXiv 2310.11453) and Ma et al. 2024 (arXiv 2402.17764). The norm that those papers put
    inside the layer is the block's own RMSNorm, and SubLN where it is configured.

    With `strength` lambda below 1, quantisation being turned on, inputs and weights are x + lambda (Q(x) - x).

    Weights are quantised when they have changed, which is once per optimizer step, and not at every use.

    `log_step` is there for weights of a learned step size only, a scalar or one per row: step = exp(log_step) is
    positive by construction, and a step of AdamW, which is as large as the learning rate, changes it by a fraction of
    itself. (Jain et al. 2020, arXiv 1903.08066, appendix B, learn logarithms of thresholds for these reasons.)
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
        super().__init__(in_features, out_features, bias=False, device=None if weight is None else "meta")
        if weight is not None:
            self.weight = weight
        self.register_parameter("bias", bias)
        self.quantize = quantize
        steps = (out_features,) if quantize.scale_per == "row" else ()
        self.log_step = nn.Parameter(self.weight.new_zeros(steps)) if quantize.has_learned_step else None
        self.strength = 1.0
        self._quantized: _Quantized | None = None
        self.fit_step()

    @torch.no_grad()
    def fit_step(self) -> None:
        """Set the learned step, if there is one, to its initial value for the weights that are here now."""
        if self.log_step is None:
            return
        per = self.quantize.scale_per
        first_R1 = (
            initial_seq_step(self.weight, per)
            if self.quantize.weights == "seq"
            else initial_step(self.weight, self._bits, per)
        )
        self.log_step.copy_(first_R1.log().reshape(self.log_step.shape))

    def ternary(self) -> TernaryWeight:
        """Trits and scales of the weights that are here now, with no gradient; of a ternary code only."""
        found = self._current().ternary
        assert found is not None, f"{self.quantize.weights} is not ternary"
        return found

    def quantized_weight(self) -> Tensor:
        """Q_w(W), differentiable, of the weight's shape and dtype: what the layer multiplies by."""
        if self.quantize.weights == "none":
            return self.weight
        values_OI = self._current().values_OI
        if self.log_step is None:
            quantized_OI = straight_through(self.weight, values_OI)
        else:
            step_R1 = self._step_R1(self.log_step)
            quantized_OI = through_step(self.weight, step_R1, values_OI, largest_level(self._bits))
        return quantized_OI if self.strength == 1 else torch.lerp(self.weight, quantized_OI, self.strength)

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

    def quantized_input(self, x: Tensor) -> Tensor:
        """Q_a(x), differentiable."""
        if self.quantize.activations == "none":
            return x
        quantized = straight_through(x, absmax_quantize(x))
        return quantized if self.strength == 1 else torch.lerp(x, quantized, self.strength)

    def _current(self) -> _Quantized:
        """The weights quantised; in a compiled graph, which cannot look for changes, as `refresh` left them."""
        if not torch.compiler.is_compiling():
            self.refresh()
        assert self._quantized is not None, "refreshed before a graph that was compiled runs"
        return self._quantized

    @torch.inference_mode(mode=False)  # training may follow, which cannot use what is made in that mode
    @torch.no_grad()
    def refresh(self) -> None:
        """Quantise the weights again if they or the step were written to since the last time."""
        if self.quantize.weights == "none":
            return
        sources = [self.weight] if self.log_step is None else [self.weight, self.log_step]
        made_of = tuple(number for source in sources for number in (source.data_ptr(), _num_writes(source)))
        if self._quantized is None or self._quantized.made_of != made_of:
            ternary = self._quantize_to_trits() if self.quantize.is_ternary else None
            values_OI = self._quantize_to_bits() if ternary is None else ternary.dequantized()
            self._quantized = _Quantized(made_of, values_OI, ternary)

    def forget(self) -> None:
        """Quantise the weights again at the next use: for changes that torch does not count as a write."""
        self._quantized = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of every module: a move to another device or dtype, which torch does not count as a write."""
        self.forget()
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def _quantize_to_trits(self) -> TernaryWeight:
        match self.quantize.weights:
            case "absmean":
                return absmean_ternary(self.weight, self.quantize.scale_per)
            case "twn":
                return twn_ternary(self.weight, self.quantize.scale_per)
        assert self.log_step is not None, "made with the layer"
        quantize = seq_ternary if self.quantize.weights == "seq" else learned_ternary
        return quantize(self.weight, self._step_R1(self.log_step))

    def _quantize_to_bits(self) -> Tensor:
        if self.log_step is not None:
            return learned_quantize(self.weight, self._step_R1(self.log_step), self._bits)
        return nbit_quantize(self.weight, self._bits, error_diffusion=self.quantize.weights == "nbit-diffused")

    def _step_R1(self, log_step: Tensor) -> Tensor:  # noqa: N802 - shape suffix
        return log_step.exp().reshape(-1, 1)

    @property
    def _bits(self) -> int:
        assert self.quantize.packed_bits is not None, "the config refuses an nbit code without bits"
        return self.quantize.packed_bits


def _num_writes(tensor: Tensor) -> int:
    """How often torch counted a write to its memory; see torch.autograd.graph.increment_version."""
    return tensor._version  # noqa: SLF001 - the name under which torch documents it


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Every layer's product with the same x, whose 8-bit codes are made once."""
    codes = next((layer.codes_of(x) for layer in layers if isinstance(layer, QuantizedLinear)), None)
    return [layer.multiply(x, codes) if isinstance(layer, QuantizedLinear) else layer(x) for layer in layers]


def quantize_linears(model: nn.Module, quantize: QuantizeConfig) -> None:
    """Replace the linear layers that the config names, in place; their weights remain.

    Raises StageError for a pattern that names none, and for rows that cannot be cut into the groups that are asked for.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    if problems := quantize.misfits(shapes):
        raise StageError("; ".join(f"student.quantize.{problem}" for problem in problems))
    for name, linear in linears.items():
        if quantize.covers(name):
            quantized = QuantizedLinear(linear.in_features, linear.out_features, quantize, linear.weight, linear.bias)
            model.set_submodule(name, quantized)
