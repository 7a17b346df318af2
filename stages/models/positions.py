"""How many positions a model has, or was trained for."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tristill.stages.errors import CheckpointError
from tristill.stages.models.language_model import LanguageModel
from tristill.stages.progress import say

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
