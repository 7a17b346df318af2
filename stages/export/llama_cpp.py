"""A GGUF file in llama.cpp itself, through the package xllamacpp: what it computes, and how fast.

Imports no torch, so that a process of its own starts fast. Shapes: T positions, V vocabulary.
"""

import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tristill.stages.errors import ExportError
from tristill.stages.export.packages import find_xllamacpp

_LOWEST_LOG_PROB = -1e4
_SILENT = -1


@dataclass(frozen=True)
class Timings:
    """What llama.cpp measured of one request."""

    prompt_tokens: int
    prompt_s: float
    new_tokens: int
    new_s: float


class LlamaCpp:
    """A file loaded by llama.cpp on the CPU. A file that llama.cpp asserts against ends the whole process."""

    def __init__(self, path: Path, context_length: int, *, threads: int = 1, exact: bool = True) -> None:
        """`exact`: keys and values in F32 and attention as written, to compare; else the defaults, to measure speed.

        Prompt and new tokens together have at most context_length, and what the file says that it was trained for.
        """
        xllamacpp = find_xllamacpp()
        if xllamacpp is None:
            raise ExportError(
                "llama.cpp is run by the package xllamacpp, which is not installed; run `pip install -e '.[gguf]'`"
            )
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context_length
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = False
        params.verbosity = _SILENT
        params.port = 0
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.version = str(xllamacpp.__version__)
        self._path = path
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as exc:
            raise ExportError(f"{path}: llama.cpp cannot load it ({exc})") from exc

    def log_probs(self, ids: Sequence[int], vocab_size: int) -> np.ndarray:
        """Natural log-probabilities of the id after `ids`, (V,) float64; what of `ids` was fed before is not again."""
        answer = self._complete(ids, n_predict=1, n_probs=vocab_size)
        probabilities = answer.get("completion_probabilities") or answer["choices"][0]["logprobs"]["content"]
        found_V = np.full(vocab_size, np.nan)
        for entry in probabilities[0]["top_logprobs"]:
            found_V[entry["id"]] = max(entry["logprob"], _LOWEST_LOG_PROB)  # llama.cpp: the lowest float where p is 0
        if num_missing := int(np.isnan(found_V).sum()):
            raise ExportError(
                f"{self._path}: llama.cpp gave no log-probability of {num_missing} of {vocab_size} tokens"
            )
        return found_V

    def greedy(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """The most likely ids after `ids`, one after the other, up to an end of text."""
        answer = self._complete(ids, n_predict=num_tokens, n_probs=1)
        probabilities = answer.get("completion_probabilities") or answer["choices"][0]["logprobs"]["content"]
        return [int(entry["id"]) for entry in probabilities]

    def time(self, ids: Sequence[int], num_tokens: int) -> Timings:
        """Feed `ids`, none of which is remembered, and write `num_tokens` after them."""
        answer = self._complete(ids, n_predict=num_tokens, cache_prompt=False, ignore_eos=True)
        found = answer["timings"]
        return Timings(
            int(found["prompt_n"]), found["prompt_ms"] / 1e3, int(found["predicted_n"]), found["predicted_ms"] / 1e3
        )

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text; names of special tokens in it are those tokens."""
        body = {"content": text, "add_special": False, "parse_special": True}
        request = urllib.request.Request(  # noqa: S310 - its own address on this machine
            f"{self._server.listening_address}/tokenize",
            json.dumps(body).encode("utf-8"),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:  # noqa: S310 - as above
            return [int(token_id) for token_id in json.load(response)["tokens"]]

    def _complete(self, ids: Sequence[int], **wanted: Any) -> dict[str, Any]:
        request = {"prompt": [int(token_id) for token_id in ids], "temperature": 0, "cache_prompt": True, **wanted}
        try:
            answer: dict[str, Any] = self._server.handle_completions(request)
        except RuntimeError as exc:
            raise ExportError(f"{self._path}: llama.cpp cannot run it ({exc})") from exc
        if "error" in answer or answer.get("code", 200) != 200:
            raise ExportError(f"{self._path}: llama.cpp refused a request ({answer.get('error', answer)})")
        return answer
