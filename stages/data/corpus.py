"""Documents of a corpus, one after the other, through `datasets`."""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from stages.data.chat import ChatTemplate, Document
from stages.data.config import DataConfig, HuggingFaceDataset, PythonStdlib, RecordFiles, TextFiles
from stages.data.files import CorpusFile, corpus_files
from stages.data.remote_files import brought_here
from stages.errors import CorpusError

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_SAMPLE_BY = {"file": "document", "paragraph": "paragraph", "line": "line"}


def documents(source: PythonStdlib | TextFiles | RecordFiles | HuggingFaceDataset) -> Iterator[str]:
    """The documents in a fixed order, empty ones left out; no more than one is held in memory at a time."""
    if isinstance(source, RecordFiles | HuggingFaceDataset):
        yield from _text_column(source)
        return
    sample_by = _SAMPLE_BY[source.documents] if isinstance(source, TextFiles) else "document"
    for files, url in brought_here(_readable(corpus_files(source))):
        yield from _text_documents(files, url, sample_by)


def _text_documents(files: list[Path], url: str | None, sample_by: str) -> Iterator[str]:
    try:
        names = [glob.escape(str(file)) for file in files]
        rows = datasets.load_dataset("text", data_files=names, sample_by=sample_by, split="train", streaming=True)
        yield from (row["text"] for row in rows if row["text"])
    except UnicodeDecodeError as exc:
        raise CorpusError(
            f"{url or _first_not_utf8(files)}: is not UTF-8 text ({exc.reason}); convert it or leave it out"
        ) from exc
    except OSError as exc:
        raise CorpusError(f"{url or exc.filename or 'corpus'}: cannot be read ({exc.strerror or exc})") from exc


def chats(source: RecordFiles | HuggingFaceDataset, template: ChatTemplate) -> Iterator[Document]:
    """The chats in a fixed order, rendered, empty ones left out; no more than one is held in memory at a time."""
    column = source.chat_column
    assert column is not None, "asked for only then"
    for number, (where, row) in enumerate(_rows(source), start=1):
        messages = row.get(column)
        if messages is None and column in row:
            continue
        if not _is_chat(messages):
            found = f"{str(messages)[:80]!r} in that column" if column in row else f"no column {column!r}"
            raise CorpusError(
                f"{where}, row {number}: found {found}, expected a list of messages, each with role and content as "
                f"text, in one of {sorted(row)}; set data.source.chat_column"
            )
        if messages:
            given = [{key: value for key, value in message.items() if value is not None} for message in messages]
            yield template.document(given, f"{where}, row {number}")


def _is_chat(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )


def is_validation(document: str, config: DataConfig) -> bool:
    """Whether a document is held out: the first 64 bits of its SHA-256, as a fraction, lie below it.

    A pure function of the content, so duplicates never stand on both sides and other documents change nothing.
    """
    digest = hashlib.sha256(document.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < config.validation_fraction * 2**64


def _text_column(source: RecordFiles | HuggingFaceDataset) -> Iterator[str]:
    for where, row in _rows(source):
        text = row.get(source.text_column)
        if not isinstance(text, str | None) or source.text_column not in row:
            found = f"no column {source.text_column!r}" if text is None else f"{type(text).__name__} in that column"
            raise CorpusError(
                f"{where}: found {found}, expected text in one of {sorted(row)}; set data.source.text_column"
            )
        if text:
            yield text


def _rows(source: RecordFiles | HuggingFaceDataset) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row, and where it is from."""
    if isinstance(source, HuggingFaceDataset):
        where = f"data set {source.path!r}, split {source.split!r}"
        arguments = {"split": source.split, "streaming": source.streaming, **source.arguments}
        yield from ((where, row) for row in _loaded(where, source.path, source.name, **arguments))
        return
    files = _readable(corpus_files(source))
    if odd := [file for file in files if file.suffix not in _BUILDERS]:
        raise CorpusError(
            f"{odd[0]}: found a file with suffix {odd[0].suffix!r}, expected one of {sorted(_BUILDERS)}; correct "
            "data.source.paths, or read text with data.source.kind = 'text'"
        )
    for batch, url in brought_here(files):
        for file in batch:
            names, where = [glob.escape(str(file))], url or str(file)
            rows = _loaded(where, _BUILDERS[file.suffix], data_files=names, split="train", streaming=True)
            yield from ((where, row) for row in rows)


def _loaded(where: str, *arguments: Any, **options: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from datasets.load_dataset(*arguments, **options)
    except Exception as exc:  # the library raises many kinds: network, builder, arrow, parsers
        raise CorpusError(f"{where}: cannot be loaded ({type(exc).__name__}: {exc})") from exc


def _readable(files: Sequence[CorpusFile]) -> Sequence[CorpusFile]:
    if odd := [file for file in files if "::" in str(file)]:
        raise CorpusError(f"{odd[0]}: a file name with '::' cannot be read by `datasets`; rename it")
    return files


def _first_not_utf8(files: list[Path]) -> Path:
    for file in files:
        try:
            with file.open(encoding="utf-8") as lines:
                for _ in lines:
                    pass
        except UnicodeDecodeError:
            return file
    return files[0]
