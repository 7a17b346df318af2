"""What the process of its own does that `llama_cpp_runtime` starts: holds one file in llama.cpp. Imports no torch."""

from pathlib import Path

import numpy as np

from tristill.stages.export.llama_cpp import LlamaCpp

_held: list[LlamaCpp] = []


def load(path: Path, context_length: int) -> str:
    """Hold this file from now on; the version of the package."""
    _held[:] = [LlamaCpp(path, context_length)]
    return _held[0].version


def log_probs(ids: list[int], lengths: list[int], vocab_size: int) -> np.ndarray:
    """Log-probabilities after the first so many ids, for each of these lengths, (P, V) float64."""
    return np.stack([_held[0].log_probs(ids[:length], vocab_size) for length in lengths])


def greedy(ids: list[int], num_tokens: int) -> list[int]:
    """See LlamaCpp."""
    return _held[0].greedy(ids, num_tokens)


def tokenize(text: str) -> list[int]:
    """See LlamaCpp."""
    return _held[0].tokenize(text)
