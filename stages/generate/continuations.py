"""How a model goes on from pieces of held-out text."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch

from tristill.stages.data.tokenizer import load_tokenizer
from tristill.stages.generate.text import load_generator
from tristill.stages.models.description import TOKENIZER_NAME
from tristill.stages.models.generate import Sampling, generate


def continuations(
    folder: Path, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float, top_p: float, seed: int
) -> list[str]:
    """The text that the model in `folder` writes after each prompt, given as ids of its tokenizer.

    Row b is drawn with the same random numbers whatever the model, so that models are compared by what they expect and
    not by their luck. Raises PromptError where the context has no room for them, and what loading a model raises.
    """
    tokenizer = load_tokenizer(folder / TOKENIZER_NAME)
    model = load_generator(folder)
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
