"""Text from the model in a folder, as it is written, and after prompts of a batch."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from tristill.stages.data.text_stream import TextStream
from tristill.stages.data.tokenizer import load_tokenizer
from tristill.stages.errors import PromptError, TokenizerError
from tristill.stages.models.description import TOKENIZER_NAME
from tristill.stages.models.generate import CausalModel, Sampling, generate, load_causal_model, stream
from tristill.stages.progress import say
from tristill.stages.tokenizer_file import panics_named

DEFAULT_MAX_TOKENS = 100
_CPU = torch.device("cpu")


def generate_text(
    folder: Path,
    prompt: str,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    max_tokens: int | None,
    on_done: Callable[[str], None] = say,
) -> Iterator[str]:
    """The prompt, then what the model in the folder writes after it, in pieces of whole characters as it is written.

    One row of random numbers, those that the first document of a synthetic corpus of this seed has. Without max_tokens
    there are 100, or as many as the context has room for. `on_done` is told at the end how fast it was. Raises
    PromptError if the context has no room, or not enough.
    """
    tokenizer = load_tokenizer(folder / TOKENIZER_NAME)
    model = load_causal_model(folder, _CPU)
    with panics_named(folder / TOKENIZER_NAME):
        ids = model.started(tokenizer.encode(prompt, add_special_tokens=False).ids)
    sampling = Sampling(temperature, top_p, _room(ids, model, tokenizer, max_tokens, folder))
    uniform_M = np.random.default_rng([seed, 0]).random(sampling.max_tokens)
    yield prompt
    text = TextStream(tokenizer, ids[1:])
    num_new, started_s = 0, time.perf_counter()
    for drawn in stream(model, [ids], sampling, torch.from_numpy(uniform_M)[None]):
        for _, new_id in drawn:
            num_new += 1
            yield text.add(new_id)
    yield text.finish()
    elapsed_s = time.perf_counter() - started_s
    on_done(
        f"{num_new} tokens after {len(ids) - 1} of prompt in {elapsed_s:.2f} s: {num_new / elapsed_s:,.0f} tokens/s"
    )


def _room(ids: list[int], model: CausalModel, tokenizer: Tokenizer, max_tokens: int | None, folder: Path) -> int:
    """How many tokens to write; refuses a prompt that leaves no room for them."""
    if max(ids) >= model.vocab_size:
        raise TokenizerError(
            f"{folder / TOKENIZER_NAME}: found id {max(ids)} ({tokenizer.id_to_token(max(ids))!r}), expected less than "
            f"{model.vocab_size}, the model's vocabulary; leave that token out, or give the model's own tokenizer"
        )
    wanted = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    if model.max_positions is None:
        return wanted
    num_prompt = len(ids) - 1
    room = model.max_positions - num_prompt
    if room < 1:
        raise PromptError(
            f"--prompt: found {num_prompt} tokens, expected at most {model.max_positions - 1}, as {folder} has a "
            f"context of {model.max_positions}; shorten it"
        )
    if max_tokens is not None and max_tokens > room:
        raise PromptError(
            f"--max-tokens: found {max_tokens} after {num_prompt} tokens of prompt, expected at most {room}, as "
            f"{folder} has a context of {model.max_positions}; lower it or shorten the prompt"
        )
    return min(wanted, room)


def continuations(
    folder: Path, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float, top_p: float, seed: int
) -> list[str]:
    """The text that the model in `folder` writes after each prompt, given as ids of its tokenizer.

    Row b is drawn with the same random numbers whatever the model, so that models are compared by what they expect and
    not by their luck. Raises PromptError where the context has no room for them, and what loading a model raises.
    """
    tokenizer = load_tokenizer(folder / TOKENIZER_NAME)
    model = load_causal_model(folder, _CPU)
    uniform_BM = torch.from_numpy(np.random.default_rng(seed).random((len(prompts), max_tokens)))
    rows = [model.started(prompt) for prompt in prompts]
    written = generate(model, rows, Sampling(temperature, top_p, max_tokens), uniform_BM)
    return [
        _added(tokenizer.decode(row[1:]), tokenizer.decode(list(prompt)))
        for row, prompt in zip(written, prompts, strict=True)
    ]


def _added(text: str, prompt: str) -> str:
    """What comes after the prompt; its last character may have been half of one."""
    common = takewhile(lambda pair: pair[0] == pair[1], zip(text, prompt, strict=False))
    return text[sum(1 for _ in common) :]
