"""Our transformer computing as other runtimes do: activations rounded per position, per block of 256, or not at all."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from stages.export.formats import BLOCK_COLUMNS
from stages.export.student import float_activations, int8_activations
from stages.models.transformer import Transformer
from stages.quantize.absmax import absmax_quantize

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TorchRuntime:
    """A runtime (see parity) that is our own transformer."""

    name: str
    model: Transformer
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


def as_trained(model: Transformer) -> TorchRuntime:
    """The student with its own rounding of activations."""
    return TorchRuntime("as trained", model)


def without_rounding(model: Transformer) -> TorchRuntime:
    """The student's weights with activations in float32: what a dequantised model computes."""
    return TorchRuntime("float activations", float_activations(model))


def rounded_per_position(model: Transformer) -> TorchRuntime:
    """The student's weights with 8 bits per position, whatever it was trained with: what packed layers compute."""
    return TorchRuntime("int8 activations per position", int8_activations(model))


def rounded_in_blocks(model: Transformer, ternary: Collection[str] | None = None) -> TorchRuntime:
    """The same weights with 8 bits per block of 256 before every ternary layer: what llama.cpp computes.

    `ternary`: names of these layers in a model in full precision; a student of ours knows them, and gets a twin.
    """
    twin = model if ternary is not None else float_activations(model)
    names = set(model.quantized_linears()) if ternary is None else set(ternary)
    round_before(twin, names - {"lm_head"}, int8_blocks)
    name = "int8 activations per block of 256" if ternary is None else "the file, read back"
    return TorchRuntime(name, twin, int8_blocks if "lm_head" in names else None)


def round_before(model: nn.Module, names: Collection[str], rounding: Rounding) -> None:
    """Round the input of these layers of the model, from now on."""

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounding(inputs[0]), *inputs[1:])

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(rounded)
