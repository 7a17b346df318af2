"""What takes part in the timing: a model in PyTorch, or a GGUF file in llama.cpp."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from tristill.stages.errors import ExportError
from tristill.stages.export.llama_cpp import LlamaCpp, Timings
from tristill.stages.models.generate import rollout_of
from tristill.stages.models.language_model import LanguageModel

_Answer = TypeVar("_Answer")
_loaded: list[LlamaCpp] = []
"""Of a process of its own: the one file that it has."""


class Contender(Protocol):
    """A loaded model."""

    def time(self, ids: Sequence[int], num_tokens: int) -> Timings:
        """Process the ids as a prompt, then as many new ones, one at a time, each the most likely."""


class InTorch:
    """A model in PyTorch, as it is in memory; timed by the clock around each part."""

    def __init__(self, model: LanguageModel, folder: Path) -> None:
        """Raises CheckpointError for a model that keeps no keys and values. folder: where it is from."""
        self._rollout = rollout_of(model.eval(), folder)

    @torch.inference_mode()
    def time(self, ids: Sequence[int], num_tokens: int) -> Timings:
        """See Contender. An end of text does not end it."""
        rollout = self._rollout(len(ids) + num_tokens)
        prompt_1T = torch.tensor([ids])
        started_s = time.perf_counter()
        next_11 = rollout.feed(prompt_1T).argmax(dim=-1, keepdim=True)
        prompt_done_s = time.perf_counter()
        for _ in range(num_tokens):
            next_11 = rollout.feed(next_11).argmax(dim=-1, keepdim=True)
        done_s = time.perf_counter()
        return Timings(len(ids), prompt_done_s - started_s, num_tokens, done_s - prompt_done_s)


class InLlamaCpp:
    """A GGUF file in llama.cpp, in a process of its own, which is all that an assertion of llama.cpp ends.

    The times are those that llama.cpp's server measures and returns with each answer. It counts a new token when it is
    drawn and starts the clock of generation at the first, so that n tokens took n - 1 passes.
    """

    def __init__(self, stack: ExitStack, path: Path, context_length: int, threads: int) -> None:
        """The process ends with the stack. Raises ExportError if the file does not load."""
        pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
        self._pool = stack.enter_context(pool)
        self._path = path
        self.version = self._there(_load, path, context_length, threads)

    def time(self, ids: Sequence[int], num_tokens: int) -> Timings:
        """See Contender."""
        found = self._there(_time, list(ids), num_tokens + 1)
        return Timings(found.prompt_tokens, found.prompt_s, found.new_tokens - 1, found.new_s)

    def _there(self, function: Callable[..., _Answer], *arguments: object) -> _Answer:
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool as exc:
            raise ExportError(
                f"{self._path}: llama.cpp ended its process over this file; its message is above, if it had one"
            ) from exc


def _load(path: Path, context_length: int, threads: int) -> str:
    _loaded[:] = [LlamaCpp(path, context_length, threads=threads, exact=False)]
    return _loaded[0].version


def _time(ids: list[int], num_tokens: int) -> Timings:
    return _loaded[0].time(ids, num_tokens)
