"""Text ids from a causal language model: temperature, nucleus, rows of different length, keys and values kept.

Shapes: B rows, R rows still going, T positions, V vocabulary, K most likely ids, L the longest row, M new ids at most.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from tristill.stages.errors import CheckpointError
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.companions import SpecialIds
from tristill.stages.models.description import CONFIG_NAME, START_KEY, TOKENIZER_NAME, is_ours, read_config
from tristill.stages.models.hugging_face import HuggingFaceModel
from tristill.stages.models.hugging_face_folder import load_inner, num_ids
from tristill.stages.models.language_model import LanguageModel, require_finite, trained_positions
from tristill.stages.models.origin import Origin, checked_origin
from tristill.stages.models.quantized_linear import QuantizedLinear
from tristill.stages.models.transformer import LayerPast, Transformer

_FIRST_LOOK = 1024


class Rollout(Protocol):
    """Rows of ids on their way through a model, all at the same position."""

    def feed(self, ids_RT: Tensor) -> Tensor:
        """Take the next ids of every row; (R, V) logits of the id after the last one, float32."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""


@dataclass(frozen=True)
class CausalModel:
    """What generation needs of a model, whoever made it."""

    start_id: int
    """Comes before every text."""
    stop_ids: tuple[int, ...]
    """Any of them ends a text and is no part of it."""
    vocab_size: int
    max_positions: int | None
    """Positions it was made for; None if it knows no bound."""
    device: torch.device
    rollout: Callable[[int], Rollout]
    """An empty one, with room for so many positions."""
    dtype: torch.dtype = torch.float32
    """Its states are computed in this."""

    def started(self, prompt: Sequence[int]) -> list[int]:
        """The ids of a text with the one that comes before it, which a chat or a window may have already."""
        return list(prompt) if prompt and prompt[0] == self.start_id else [self.start_id, *prompt]


@dataclass(frozen=True)
class Sampling:
    """How an id is drawn: from p_tau, cut to the nucleus of mass `top_p` and renormalised; `max_tokens` times.

    Temperature 0 takes the most likely id, the first of several.
    """

    temperature: float
    top_p: float
    max_tokens: int


class TransformerRollout:
    """A rollout of our own model."""

    def __init__(self, model: Transformer, capacity: int) -> None:
        self._model = model
        self._past = [LayerPast(capacity) for _ in range(model.config.layers)]

    def feed(self, ids_RT: Tensor) -> Tensor:
        """As in Rollout; the head runs on the last position only."""
        last_RD = self._model(ids_RT, past=self._past).final_BTD[:, -1]
        head = self._model.lm_head
        is_latent = isinstance(head, QuantizedLinear)  # it has quantised its input, last_RD, already
        logits_RV = F.linear(last_RD, self._model.head_weight) if is_latent else head(last_RD)
        return logits_RV.float()

    def keep(self, rows: Tensor) -> None:
        """As in Rollout."""
        for layer in self._past:
            layer.keep(rows)


def draw(logits_RV: Tensor, uniform_R: Tensor, sampling: Sampling) -> Tensor:
    """One id per row, (R,): where the cumulated probability passes the row's uniform number from [0, 1).

    With top_p < 1 the ids are taken from the most likely down, and only the smallest set whose probabilities at
    sampling.temperature sum to at least top_p takes part: Holtzman et al. 2020, The Curious Case of Neural Text
    Degeneration (arXiv 1904.09751), section 3.1. Sums are float64.
    """
    if sampling.temperature == 0:
        return logits_RV.argmax(dim=-1)
    p_RV = torch.softmax(logits_RV / sampling.temperature, dim=-1)
    if sampling.top_p == 1:
        mass_RV = p_RV.cumsum(dim=-1, dtype=torch.float64)
        wanted_R1 = (uniform_R * mass_RV[:, -1])[:, None]
        return torch.searchsorted(mass_RV, wanted_R1, right=True)[:, 0].clamp_(max=p_RV.shape[1] - 1)
    return _draw_from_nucleus(p_RV, uniform_R, sampling.top_p, _FIRST_LOOK)


def _draw_from_nucleus(p_RV: Tensor, uniform_R: Tensor, top_p: float, num_sorted: int) -> Tensor:
    """As `draw`, from probabilities, sorting at first so many: sorting all takes longer than a small model does."""
    p_RK, ids_RK = p_RV.topk(min(num_sorted, p_RV.shape[1]), dim=-1)
    mass_RK = p_RK.cumsum(dim=-1, dtype=torch.float64)
    last_R1 = (mass_RK - p_RK < top_p).sum(dim=-1, keepdim=True) - 1
    wanted_R1 = uniform_R[:, None] * mass_RK.gather(1, last_R1)
    rank_R1 = torch.searchsorted(mass_RK, wanted_R1, right=True).minimum(last_R1)
    drawn_R = ids_RK.gather(1, rank_R1)[:, 0]
    wide_R = mass_RK[:, -1] < top_p  # the nucleus has more than were sorted
    if num_sorted < p_RV.shape[1] and bool(wide_R.any()):
        drawn_R[wide_R] = _draw_from_nucleus(p_RV[wide_R], uniform_R[wide_R], top_p, 4 * num_sorted)
    return drawn_R


def generate(
    model: CausalModel, prompts: Sequence[Sequence[int]], sampling: Sampling, uniform_BM: Tensor
) -> list[list[int]]:
    """Each prompt, not empty, with what the model writes after it, up to a stop id or sampling.max_tokens new ids.

    See `stream`, which gives the same ids one by one.
    """
    rows = [list(prompt) for prompt in prompts]
    for drawn in stream(model, prompts, sampling, uniform_BM):
        for row, new_id in drawn:
            rows[row].append(new_id)
    return rows


@torch.inference_mode()
def stream(
    model: CausalModel, prompts: Sequence[Sequence[int]], sampling: Sampling, uniform_BM: Tensor
) -> Iterator[list[tuple[int, int]]]:
    """Pairs of row and new id, as they are drawn, a list for every position; stop ids are not among them.

    Row b's m-th new id is drawn with uniform_BM[b, m], so that all randomness is the caller's. All rows stand at the
    same position, with no padding: while a row is still in its prompt, its next id is the prompt's, not the drawn one.
    Rows that ended are dropped once they are half of all.
    """
    uniform_BM = uniform_BM.to(model.device)
    stop_ids = torch.tensor(model.stop_ids, device=model.device)
    starts_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    ends_B = starts_B + sampling.max_tokens
    ids_BL = torch.zeros(len(prompts), int(ends_B.max()), dtype=torch.long, device=model.device)
    for row, prompt in enumerate(prompts):
        ids_BL[row, : len(prompt)] = torch.tensor(prompt)
    rollout = model.rollout(ids_BL.shape[1])
    rows_R = torch.arange(len(prompts), device=model.device)
    position = int(starts_B.min())
    logits_RV = rollout.feed(ids_BL[:, :position])
    while True:
        num_new_R = position - starts_B[rows_R]
        uniform_R = uniform_BM[rows_R, num_new_R.clamp(0, sampling.max_tokens - 1)]
        require_finite(model.dtype, logits_RV, f"the logits of position {position - 1}")
        drawn_R = draw(logits_RV, uniform_R, sampling)
        is_new_R = num_new_R >= 0
        ids_BL[rows_R, position] = torch.where(is_new_R, drawn_R, ids_BL[rows_R, position])
        stopped = rows_R[is_new_R & torch.isin(drawn_R, stop_ids)]
        ends_B[stopped] = ends_B[stopped].clamp(max=position)  # a row that ended before may draw another stop id
        has_new_R = is_new_R & (ends_B[rows_R] > position)
        yield list(zip(rows_R[has_new_R].tolist(), drawn_R[has_new_R].tolist(), strict=True))
        position += 1
        going_R = ends_B[rows_R] > position
        num_going = int(going_R.sum())
        if not num_going:
            return
        if 2 * num_going <= len(rows_R):
            rows_R = rows_R[going_R]
            rollout.keep(going_R.nonzero()[:, 0])
        logits_RV = rollout.feed(ids_BL[rows_R, position - 1, None])


def load_causal_model(folder: Path, device: torch.device) -> CausalModel:
    """The model in `folder`: a teacher or student of ours by our own code, anything else by transformers."""
    origin = checked_origin(folder)
    if origin is not None or not is_ours(read_config(folder / CONFIG_NAME)):
        return _hugging_face_model(origin or Origin(folder=folder), folder / TOKENIZER_NAME, device)
    model = load_model(folder).to(device).eval()
    config = read_config(folder / CONFIG_NAME)
    try:
        end_of_text_id, max_positions = int(config["eos_token_id"]), int(config["max_position_embeddings"])
        start_id = int(config.get(START_KEY, end_of_text_id))
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"{folder / CONFIG_NAME}: does not describe a model of ours ({exc})") from exc
    return CausalModel(
        start_id=start_id,
        stop_ids=tuple(dict.fromkeys([end_of_text_id, *SpecialIds.of(folder).ends])),
        vocab_size=model.vocab_size,
        max_positions=max_positions,
        device=device,
        rollout=rollout_of(model, folder),
    )


def rollout_of(model: LanguageModel, folder: Path) -> Callable[[int], Rollout]:
    """An empty rollout of any model, with room for so many positions. folder: where it is from, for messages."""
    if isinstance(model, HuggingFaceModel):
        _require_attention(model.inner, folder)
        return partial(HuggingFaceRollout, model.inner, model.vocab_size)
    assert isinstance(model, Transformer), "models are ours or of transformers"
    return partial(TransformerRollout, model)


_KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer"}
"""Layers of transformers' caches that rows can be taken out of; states of convolutions and recurrences cannot."""


class HuggingFaceRollout:
    """A rollout of a model of transformers, on its own cache; ids from vocab_size on are padding and not drawn."""

    def __init__(self, model: Any, vocab_size: int, capacity: int) -> None:  # noqa: ARG002 - its cache grows
        self._model = model
        self._vocab_size = vocab_size
        self._cache: Any = None
        self._ids_RT: Tensor | None = None
        can_keep_one = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._arguments = {"logits_to_keep": 1} if can_keep_one else {}

    def feed(self, ids_RT: Tensor) -> Tensor:
        """As in Rollout."""
        self._ids_RT = ids_RT if self._ids_RT is None else torch.cat([self._ids_RT, ids_RT], dim=1)
        new_RT = self._ids_RT if self._cache is None else ids_RT
        out = self._model(input_ids=new_RT, past_key_values=self._cache, use_cache=True, **self._arguments)
        self._cache = out.past_key_values
        last_RV: Tensor = out.logits[:, -1, : self._vocab_size].float()
        return last_RV

    def keep(self, rows: Tensor) -> None:
        """As in Rollout. A cache of which not all layers are keys and values is made anew, by going through all ids."""
        assert self._ids_RT is not None, "rows that were fed nothing are not dropped"
        self._ids_RT = self._ids_RT[rows]
        if all(type(layer).__name__ in _KEYS_AND_VALUES for layer in getattr(self._cache, "layers", [None])):
            self._cache.batch_select_indices(rows)
        else:
            self._cache = None


def _hugging_face_model(origin: Origin, tokenizer_json: Path, device: torch.device) -> CausalModel:
    """A causal model that transformers knows itself."""
    folder = origin.folder
    model = load_inner(origin)
    _require_attention(model, folder)
    found = model.generation_config.eos_token_id
    found = getattr(model.config, "eos_token_id", None) if found is None else found
    stop_ids = tuple(found) if isinstance(found, list) else (found,)
    if stop_ids == (None,):
        raise CheckpointError(f"{folder / CONFIG_NAME}: found no eos_token_id, so no text would end; set it")
    start_id = getattr(model.config, "bos_token_id", None)
    vocab_size = model.get_input_embeddings().num_embeddings
    if tokenizer_json.is_file():
        vocab_size = min(vocab_size, num_ids(tokenizer_json))
    return CausalModel(
        start_id=stop_ids[0] if start_id is None else start_id,
        stop_ids=stop_ids,
        vocab_size=vocab_size,
        max_positions=trained_positions(model.config.to_dict()),
        device=device,
        rollout=partial(HuggingFaceRollout, model.to(device), vocab_size),
        dtype=model.dtype,
    )


def _require_attention(inner: Any, folder: Path) -> None:
    if "past_key_values" not in inspect.signature(inner.forward).parameters:
        raise CheckpointError(
            f"{folder}: found a {inner.config.model_type}, which keeps no keys and values; expected a decoder with "
            "attention"
        )
