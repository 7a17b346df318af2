"""Documents of a corpus, one after the other, through `datasets`."""

import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from stages.data.config import DataConfig, HuggingFaceDataset, PythonStdlib, TextFiles
from stages.data.files import corpus_files
from stages.errors import CorpusError

_SAMPLE_BY = {"file": "document", "paragraph": "paragraph", "line": "line"}


def documents(source: PythonStdlib | TextFiles | HuggingFaceDataset) -> Iterator[str]:
    """The documents in a fixed order, empty ones left out; no more than one is held in memory at a time."""
    if isinstance(source, HuggingFaceDataset):
        yield from _hub_documents(source)
        return
    files = corpus_files(source)
    if odd := [file for file in files if "::" in str(file)]:
        raise CorpusError(f"{odd[0]}: a file name with '::' cannot be read by `datasets`; rename it")
    sample_by = _SAMPLE_BY[source.documents] if isinstance(source, TextFiles) else "document"
    try:
        names = [glob.escape(str(file)) for file in files]
        rows = datasets.load_dataset("text", data_files=names, sample_by=sample_by, split="train", streaming=True)
        yield from (row["text"] for row in rows if row["text"])
    except UnicodeDecodeError as exc:
        raise CorpusError(
            f"{_first_not_utf8(files)}: is not UTF-8 text ({exc.reason}); convert it or leave it out"
        ) from exc
    except OSError as exc:
        raise CorpusError(f"{exc.filename or 'corpus'}: cannot be read ({exc.strerror or exc})") from exc


def is_validation(document: str, config: DataConfig) -> bool:
    """Whether a document is held out: the first 64 bits of its SHA-256, as a fraction, lie below it.

    A pure function of the content, so duplicates never stand on both sides and other documents change nothing.
    """
    digest = hashlib.sha256(document.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < config.validation_fraction * 2**64


def _hub_documents(source: HuggingFaceDataset) -> Iterator[str]:
    where = f"data set {source.path!r}, split {source.split!r}"
    rows = _hub_rows(source, where)
    for row in rows:
        text = row.get(source.text_column)
        if not isinstance(text, str | None) or source.text_column not in row:
            found = f"no column {source.text_column!r}" if text is None else f"{type(text).__name__} in that column"
            raise CorpusError(
                f"{where}: found {found}, expected text in one of {sorted(row)}; set data.source.text_column"
            )
        if text:
            yield text


def _hub_rows(source: HuggingFaceDataset, where: str) -> Iterator[dict[str, Any]]:
    try:
        yield from datasets.load_dataset(
            source.path, source.name, split=source.split, streaming=source.streaming, **source.arguments
        )
    except Exception as exc:  # the library raises many kinds: network, builder, arrow, parsers
        raise CorpusError(f"{where}: cannot be loaded ({type(exc).__name__}: {exc})") from exc


def _first_not_utf8(files: list[Path]) -> Path:
    for file in files:
        try:
            with file.open(encoding="utf-8") as lines:
                for _ in lines:
                    pass
        except UnicodeDecodeError:
            return file
    return files[0]
