"""What a plan measures: a fingerprint of it, and how many positions a large teacher can be forwarded over."""

import os
from pathlib import Path

from tristill.cache.hashing import fingerprint_of
from tristill.pipeline.steps import Teacher
from tristill.pipeline.tokenize_step import Tokenize
from tristill.pipeline.workspace import Workspace
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.origin import find_model, model_files

_PASS_SECONDS = 12
"""Budgets that one pass of the teacher over the sample may take; a rehearsal makes about five."""
_FLOPS_PER_THREAD = 1e10
_BYTES_PER_WEIGHT = 2


def measured_on(workspace: Workspace, step_s: float, teacher_s: float, todo: list[str]) -> str:
    """A fingerprint of the corpus, a given teacher, the seconds that may be taken, the steps and the threads."""
    config = workspace.config.teacher
    given = None if config.path is None else find_model(config.path, config.revision, download=False)
    files = [] if given is None else [file.model_dump() for file in model_files(given)]
    corpus = Tokenize(workspace).inputs()
    return fingerprint_of([corpus, files, step_s, teacher_s, todo, _num_threads(), _has_cuda()])


def affordable_positions(workspace: Workspace, vocab_size: int, step_s: float) -> int:
    """Positions that the run's teacher is forwarded over in some seconds, going by its size; on CUDA, no bound."""
    if _has_cuda():
        return 2**62
    config = workspace.config.teacher
    shape = Teacher(workspace).shape() if config.path is None else None
    if isinstance(shape, ModelConfig):
        parameters = shape.parameters(vocab_size)
    else:
        given = None if config.path is None else find_model(config.path, config.revision, download=False)
        files = () if given is None else model_files(given)
        parameters = sum(file.num_bytes for file in files) // _BYTES_PER_WEIGHT
    flops = _PASS_SECONDS * step_s * _num_threads() * _FLOPS_PER_THREAD
    return int(flops / max(1, 2 * parameters))


def _num_threads() -> int:
    """As torch takes them, which is not loaded here: a child begins with the peak memory of its parent."""
    found = os.environ.get("OMP_NUM_THREADS", "")
    return int(found) if found.isdecimal() and int(found) else os.cpu_count() or 1


def _has_cuda() -> bool:
    return Path("/dev/nvidiactl").exists()
