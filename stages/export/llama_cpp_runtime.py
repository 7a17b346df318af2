"""A GGUF file in llama.cpp, in a process of its own: what llama.cpp asserts against takes only that one down."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from tristill.stages.errors import ExportError
from tristill.stages.export import llama_cpp_process

_P = ParamSpec("_P")
_T = TypeVar("_T")


class LlamaCppRuntime:
    """A runtime (see parity) that is llama.cpp."""

    def __init__(self, pool: ProcessPoolExecutor, path: Path, context_length: int, vocab_size: int) -> None:
        self._pool = pool
        self._path = path
        self._vocab_size = vocab_size
        self.name = f"llama.cpp (xllamacpp {self._of_the_process(llama_cpp_process.load, path, context_length)})"

    def log_probs(self, ids_T: Tensor, positions_P: Tensor) -> Tensor:
        """See Runtime."""
        lengths = [position + 1 for position in positions_P.tolist()]
        return torch.from_numpy(
            self._of_the_process(llama_cpp_process.log_probs, ids_T.tolist(), lengths, self._vocab_size)
        )

    def greedy(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """The most likely ids after `ids`, up to an end of text."""
        return self._of_the_process(llama_cpp_process.greedy, list(ids), num_tokens)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text; names of special tokens in it are those tokens."""
        return self._of_the_process(llama_cpp_process.tokenize, text)

    def _of_the_process(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        try:
            return self._pool.submit(function, *arguments, **named).result()
        except BrokenProcessPool as exc:
            raise ExportError(
                f"{self._path}: llama.cpp ended its process over this file; its message is above, if it had one"
            ) from exc


@contextmanager
def llama_cpp_runtime(path: Path, context_length: int, vocab_size: int) -> Iterator[LlamaCppRuntime]:
    """The file in llama.cpp, for as long as the block lasts."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield LlamaCppRuntime(pool, path, context_length, vocab_size)
