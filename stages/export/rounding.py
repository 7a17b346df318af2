"""Our transformer computing as other runtimes do: activations rounded per position, per block of 256, or not at all."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tristill.stages.export.formats import BLOCK_COLUMNS
from tristill.stages.export.gguf import exported_tensors
from tristill.stages.export.student import float_activations, int8_activations, plain_transformer
from tristill.stages.models.language_model import LanguageModel
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.activations import absmax_quantize

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TorchRuntime:
    """A runtime (see parity) that is the model as it is in memory."""

    name: str
    model: LanguageModel
    round_head: Rounding | None = None
    """Applied to the input of the head; all other layers do it themselves."""

    @torch.no_grad()
    def log_probs(self, ids_T: Tensor, positions_P: Tensor) -> Tensor:
        """See Runtime."""
        final_PD = self.model(ids_T[None]).final_BTD[0, positions_P]
        if self.round_head is not None:
            final_PD = self.round_head(final_PD)
        return F.linear(final_PD, self.model.head_weight).double().log_softmax(-1)


def int8_blocks(x: Tensor) -> Tensor:
    """Each 256 neighbours rounded to 8 bits by their own absolute maximum: what llama.cpp multiplies ternary blocks by.

    Its Q8_K: round(127 x / max |x|), half to even. What is not a multiple of 256 wide cannot be in such blocks.
    """
    return absmax_quantize(x.reshape(*x.shape[:-1], -1, BLOCK_COLUMNS)).flatten(-2)


def as_trained(model: LanguageModel) -> TorchRuntime:
    """The student with its own rounding of activations."""
    return TorchRuntime("as trained", model)


def without_rounding(model: LanguageModel) -> TorchRuntime:
    """The student's weights with activations in float32: what a dequantised model computes."""
    return TorchRuntime("float activations", float_activations(model))


def rounded_per_position(model: LanguageModel) -> TorchRuntime:
    """The student's weights with 8 bits per position, whatever it was trained with: what packed layers compute."""
    return TorchRuntime("int8 per position", int8_activations(model))


def rounded_in_blocks(model: Transformer) -> TorchRuntime:
    """The student as llama.cpp computes it from ternary blocks: 8 bits per block of 256 columns of activations.

    Scales, embedding and the other matrices are rounded to float16, as a GGUF file holds them; the file is not read.
    Without that, a rounding of 1e-4 in a scale sends other activations over the edges of their 8 bits.
    """
    found = list(exported_tensors(model))
    twin = plain_transformer(model.config, {name: values for name, values, _ in found})
    ternary = {name for name, _, is_ternary in found if is_ternary}
    return in_blocks("float16 scales, int8 per block of 256", twin, ternary)


def in_blocks(name: str, model: Transformer, ternary: Collection[str]) -> TorchRuntime:
    """A model in full precision whose matrices of these names get int8 activations per block of 256."""
    layers = {tensor.removesuffix(".weight") for tensor in ternary}
    round_before(model, layers - {"lm_head"}, int8_blocks)
    return TorchRuntime(name, model, int8_blocks if "lm_head" in layers else None)


def round_before(model: nn.Module, names: Collection[str], rounding: Rounding) -> None:
    """Round the input of these layers of the model, from now on."""

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounding(inputs[0]), *inputs[1:])

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(rounded)
