"""What training, dump and evaluation ask of a model, whoever made it: features, an output matrix, quantised layers.

Shapes: B batch, T positions, D width, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tristill.cache.hidden import HiddenOutput
from tristill.stages.losses.target import softcapped
from tristill.stages.models.quantized_weight import QuantizedWeight
from tristill.stages.quantize.config import QuantizeConfig


class State(NamedTuple):
    """A hidden state by name: which output of which block, by number from 1; residual 0 is the embedding."""

    output: HiddenOutput
    layer: int


@dataclass(frozen=True)
class Features:
    """What a forward pass gives.

    final_BTD: input of the output head, after the last norm. hidden: the states asked for, (B, T, D) each, but qkv,
    which is queries, keys and values before rotation, (B, T, widths of all three).
    """

    final_BTD: Tensor
    hidden: dict[State, Tensor] = field(default_factory=dict)


class StateWidths(NamedTuple):
    """Of a block: its residual stream, all queries, and all keys, which is that of all values."""

    residual: int
    query: int
    key: int

    def of(self, output: HiddenOutput) -> int:
        """The width of a hidden state."""
        return self.query + 2 * self.key if output == "qkv" else self.residual


class LanguageModel(nn.Module, ABC):
    """Token ids to features; `head_weight` turns features into logits, chunk by chunk, in the losses.

    `vocab_size` is that of the tokenizer: ids beyond it have no logits. `quantize` is None in full precision.
    """

    vocab_size: int
    quantize: QuantizeConfig | None
    softcap: float | None = None
    """Logits are capped by it, see `softcapped`; of teachers only."""
    max_positions: int | None = None
    """Positions that it has in a table; None where it computes them."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Number of blocks."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Its blocks, in order; none if its modules do not show them."""

    @property
    @abstractmethod
    def widths(self) -> StateWidths:
        """Of its hidden states."""

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """The output matrix, (V, D), quantised if it is to be."""

    @abstractmethod
    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters of its output head, which may be the embedding."""

    @property
    @abstractmethod
    def embedding_weight(self) -> Tensor:
        """The embedding, (V, D)."""

    @abstractmethod
    def forward(self, input_ids_BT: Tensor, states: Collection[State] = ()) -> Features:
        """Features of every position."""

    def logits(self, input_ids_BT: Tensor) -> Tensor:
        """Logits of every position, (B, T, V): for small inputs; training uses the chunked head."""
        return self.logits_of(self(input_ids_BT).final_BTD)

    def logits_of(self, final: Tensor) -> Tensor:
        """Logits of features (.., D), (.., V), computed in float32, or float64 if the model is."""
        dtype = torch.promote_types(final.dtype, torch.float32)
        return softcapped(F.linear(final.to(dtype), self.head_weight.to(dtype)), self.softcap)

    @abstractmethod
    def quantized_linears(self) -> Mapping[str, QuantizedWeight]:
        """The quantised linear layers by name, in order; stacks of experts, which are many in one, among them."""

    def quantize_by(self, strength: float) -> None:
        """Turn quantisation on by so much: from 0, full precision, to 1."""
        for layer in self.quantized_linears().values():
            layer.strength = strength

    def fit_steps(self) -> None:
        """Set every learned quantisation step to its initial value for the weights that are here now."""
        for layer in self.quantized_linears().values():
            layer.fit_step()
