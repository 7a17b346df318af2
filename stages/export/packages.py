"""Libraries that only exports need, imported when they are needed."""

import logging
from typing import Any

from tristill.stages.errors import ExportError


def import_gguf() -> Any:
    """The `gguf` package, which writes and reads the files of llama.cpp."""
    try:
        import gguf
        import gguf.quants
    except ImportError as exc:
        raise ExportError(
            "a GGUF file is written and checked by the package gguf, which is not installed; "
            "run `pip install -e '.[gguf]'`"
        ) from exc
    logging.getLogger("gguf").setLevel(logging.ERROR)  # what it wonders about in a tokenizer is nobody's concern
    return gguf


def find_transformers(*, packed: bool) -> Any | None:
    """The `transformers` package; None if it, or what it loads packed weights with, is not installed."""
    try:
        import transformers

        if packed:
            import accelerate  # noqa: F401 - transformers wants it there
    except ImportError:
        return None
    return transformers


def find_xllamacpp() -> Any | None:
    """The `xllamacpp` package, which is llama.cpp itself; None if it is not installed."""
    try:
        import xllamacpp
    except ImportError:
        return None
    return xllamacpp
