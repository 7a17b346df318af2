"""What training, dump and evaluation ask of a model, whoever made it: features, an output matrix, quantised layers.

Shapes: B batch, T positions, D width, V vocabulary.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tristill.cache.hidden import HiddenOutput
from tristill.stages.errors import CheckpointError
from tristill.stages.losses.target import softcapped
from tristill.stages.models.quantized_linear import QuantizedWeight
from tristill.stages.progress import say
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


def finite_features(
    model: LanguageModel, ids_BT: Tensor, states: Collection[State] = (), whose: str = "the teacher"
) -> Features:
    """The model's features of these ids. Raises CheckpointError if its final states, or those asked for, overflow."""
    features: Features = model(ids_BT, states)
    for state, values_BTD in features.hidden.items():
        if not bool(torch.isfinite(values_BTD).all()):
            raise CheckpointError(_refusal(model, values_BTD, f"{whose}: states of layer {state.layer}"))
    if not bool(torch.isfinite(features.final_BTD).all()):
        raise CheckpointError(_refusal(model, features.final_BTD, f"{whose}: {_first_layer(model, ids_BT, features)}"))
    return features


def require_finite(model_dtype: torch.dtype, values: Tensor, what: str) -> None:
    """Raises CheckpointError, naming `what`, if any of the values is not finite."""
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{what}: found numbers that are not finite; {_advice(model_dtype)}")


def _refusal(model: LanguageModel, values_BTD: Tensor, what: str) -> str:
    is_odd_BT = ~torch.isfinite(values_BTD).all(dim=-1)
    window, position = is_odd_BT.nonzero()[0].tolist()
    dtype = model.embedding_weight.dtype
    return (
        f"{what} are not finite at {int(is_odd_BT.sum())} of {is_odd_BT.numel()} positions (the first: position "
        f"{position} of window {window} of its batch), computed in {str(dtype)[6:]}; {_advice(dtype)}"
    )


@torch.no_grad()
def _first_layer(model: LanguageModel, ids_BT: Tensor, features: Features) -> str:
    """The first states of the window that overflows, in words."""
    window = int((~torch.isfinite(features.final_BTD).all(dim=-1)).any(dim=-1).nonzero()[0])
    for layer in range(1, model.depth + 1):
        state = State("residual", layer)
        try:
            found = model(ids_BT[window, None], [state]).hidden[state]
        except CheckpointError:  # its blocks do not show them
            break
        if not bool(torch.isfinite(found).all()):
            return f"final states (from layer {layer} of {model.depth} on)"
    return "final states"


def _advice(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return (
            "float16 ends at 65504: set teacher.dtype to 'bfloat16' or 'float32' (of another model, load it in one of "
            "them)"
        )
    return "its weights are damaged or diverged: train it again with a lower learning rate, or give another model"


_TRAINED = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_TABLE = re.compile(r"wpe|pos(?!.*ids$)")
"""Names of learned or sinusoidal tables of positions: wpe, embed_positions, positions_embed, pos_encoding .."""

_NOT_TEXT = re.compile("vision|visual|image|audio")
_BY_SETTING = {"mpt": "max_seq_len", "reformer": "max_position_embeddings"}
"""Architectures that make their tables, or cut their windows, by a setting."""


def trained_positions(config: dict[str, Any]) -> int | None:
    """Positions that a model was made for, as its `config.json` says; None if it does not."""
    text = config.get("text_config") or config.get("hugging_face") or config
    found = [text[key] for key in _TRAINED if isinstance(text.get(key), int) and text[key] > 0]
    return found[0] if found else None


def positions_in_tables(decoder: nn.Module, token_embedding: nn.Module) -> int | None:
    """Positions that a model of transformers has a row of a table for; None where it computes them."""
    found = [rows for module, rows in _tables(decoder) if module is not token_embedding]
    return min(found) if found else None


def _tables(decoder: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    for path, module in decoder.named_modules():
        if _NOT_TEXT.search(path):
            continue
        if isinstance(module, nn.Embedding) and _TABLE.search(path.rsplit(".", 1)[-1]):
            yield module, len(module.weight) - int(getattr(module, "offset", 0))
        for name, table in module.named_buffers(recurse=False):
            if _TABLE.search(name) and isinstance(table, Tensor) and table.ndim == 2 and table.is_floating_point():
                yield module, len(table)
    config = getattr(decoder, "config", None)
    if (setting := _BY_SETTING.get(getattr(config, "model_type", ""))) is not None:
        yield decoder, int(getattr(config, setting))


def require_positions(model: LanguageModel, context_length: int) -> None:
    """Raises CheckpointError where windows are longer than a model has positions."""
    if model.max_positions is not None and context_length > model.max_positions:
        raise CheckpointError(
            f"data.context_length: found {context_length}, expected at most {model.max_positions}, as many positions "
            "as the model has in its table of them; lower it and run `tristill tokenize --force`, or give another model"
        )


def warn_of_positions(config: dict[str, Any], context_length: int, what: str) -> None:
    """Says once where windows are longer than a model was trained for, by its `config.json`."""
    trained = trained_positions(config)
    if trained is not None and context_length > trained:
        say(
            f"warning: {what} was made for {trained:,} positions, and data.context_length is {context_length:,}: at "
            "positions beyond, what it says is worth little; lower data.context_length"
        )
