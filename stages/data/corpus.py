"""Documents of a corpus, one after the other."""

import glob
import hashlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from datetime import date, time
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import datasets

from tristill.stages.data.chat import ChatTemplate, Document
from tristill.stages.data.config import DataConfig, HuggingFaceDataset, PythonStdlib, RecordFiles, TextFiles
from tristill.stages.data.conversation import BESIDE, conversation
from tristill.stages.data.files import corpus_files
from tristill.stages.data.records import RECORD_SUFFIXES, Row, is_record_file, is_table, record_rows
from tristill.stages.data.remote_files import brought_here
from tristill.stages.data.text_files import opened, text_documents
from tristill.stages.errors import CorpusError
from tristill.stages.models.origin import refuse_unwritable_home

_T = TypeVar("_T")
_BATCH_ROWS = 1024
_BLANK_BYTES = 4096
OnEmpty = Callable[[str], object]
"""Told the name of every file that holds nothing."""


def documents(
    source: PythonStdlib | TextFiles | RecordFiles | HuggingFaceDataset, on_empty: OnEmpty = lambda _: None
) -> Iterator[str]:
    """The documents in a fixed order, empty ones left out; no more than one is held in memory at a time."""
    if isinstance(source, RecordFiles | HuggingFaceDataset):
        yield from _text_column(source, on_empty)
        return
    unit = source.documents if isinstance(source, TextFiles) else "file"
    for path, where in brought_here(corpus_files(source)):
        yield from _told_if_none(text_documents(path, where, unit), where, on_empty)


def _told_if_none(found: Iterator[_T], where: str, on_empty: OnEmpty) -> Iterator[_T]:
    first = next(found, None)
    if first is None:
        on_empty(where)
        return
    yield first
    yield from found


def chats(
    source: RecordFiles | HuggingFaceDataset, template: ChatTemplate, on_empty: OnEmpty = lambda _: None
) -> Iterator[Document]:
    """The chats in a fixed order, rendered, empty ones left out; no more than one is held in memory at a time."""
    column = source.chat_column
    assert column is not None, "asked for only then"
    beside = tuple(name for name in BESIDE if name != column)
    for where, number, row in _rows(source, (column, *beside), on_empty):
        place = f"{where}, row {number}"
        is_aligned = isinstance(source, HuggingFaceDataset) or is_table(where)
        chat = conversation(row, column, place, is_aligned=is_aligned)
        if chat is not None and chat.messages:
            yield template.document(chat.messages, place, chat.tools)


def is_validation(document: str, config: DataConfig) -> bool:
    """Whether a document is held out: the first 64 bits of its SHA-256, as a fraction, lie below it.

    A pure function of the content, so duplicates never stand on both sides and other documents change nothing.
    """
    digest = hashlib.sha256(document.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < config.validation_fraction * 2**64


def _text_column(source: RecordFiles | HuggingFaceDataset, on_empty: OnEmpty) -> Iterator[str]:
    for where, _, row in _rows(source, (source.text_column,), on_empty):
        text = row.get(source.text_column)
        if not isinstance(text, str | None) or source.text_column not in row:
            found = f"no column {source.text_column!r}" if text is None else f"{type(text).__name__} in that column"
            if isinstance(source, HuggingFaceDataset) and isinstance(text, date | time):
                found += " (`datasets` takes ISO dates in JSON for such; data.source.kind = 'records' does not)"
            raise CorpusError(
                f"{where}: found {found}, expected text in one of {sorted(row)}; set data.source.text_column"
            )
        if text:
            yield text


def _rows(
    source: RecordFiles | HuggingFaceDataset, columns: tuple[str, ...], on_empty: OnEmpty
) -> Iterator[tuple[str, int, Row]]:
    """Every row, with these columns at least where it has them; before it where it is from and its number there."""
    if isinstance(source, HuggingFaceDataset):
        where = f"data set {source.path!r}, split {source.split!r}"
        rows = enumerate(_loaded(source, where, columns, on_empty), start=1)
        yield from ((where, number, row) for number, row in rows)
        return
    files = corpus_files(source)
    if odd := [file for file in files if not is_record_file(file.name)]:
        raise CorpusError(
            f"{odd[0]}: found a file with suffix {odd[0].suffix!r}, expected one of {RECORD_SUFFIXES}; correct "
            "data.source.paths, or read text with data.source.kind = 'text'"
        )
    for path, where in brought_here(files):
        found = _told_if_none(record_rows(path, where, columns), where, on_empty)
        yield from ((where, number, row) for number, row in found)


def _loaded(source: HuggingFaceDataset, where: str, columns: tuple[str, ...], on_empty: OnEmpty) -> Iterator[Row]:
    """Rows of a data set, of these columns alone if it says that it has them: others may hold what cannot be read."""
    options = {"split": source.split, "streaming": source.streaming, **source.arguments}
    if source.path == "parquet":
        options.setdefault("batch_size", _BATCH_ROWS)  # without it files of no rows are refused
    try:
        if Path(source.path).is_dir() or "/" not in source.path:  # no name on the hub
            options = _with_content(source, options, on_empty)
        if options.get("data_files") == {}:
            return
        loaded = datasets.load_dataset(source.path, source.name, **options)
        known = [column for column in columns if column in (loaded.column_names or ())]
        yield from loaded.select_columns(known) if known else loaded
    except Exception as exc:  # the library raises many kinds: network, builder, arrow, parsers
        refuse_unwritable_home(exc)
        raise CorpusError(
            f"{where}: cannot be loaded ({type(exc).__name__}: {exc}); JSON lines, Parquet and Arrow are also read by "
            "data.source.kind = 'records', which looks at no other column"
        ) from exc


def _with_content(source: HuggingFaceDataset, options: dict[str, Any], on_empty: OnEmpty) -> dict[str, Any]:
    """The options of a data set of this machine without its files of no content, at which builders stop."""
    options = {**options, "data_files": _escaped(options["data_files"])} if "data_files" in options else options
    loading = signature(datasets.load_dataset).parameters.keys()
    beyond = loading - signature(datasets.load_dataset_builder).parameters.keys()
    arguments = {name: value for name, value in options.items() if name not in beyond}
    found = datasets.load_dataset_builder(source.path, source.name, **arguments).config.data_files or {}
    empty = {file for files in found.values() for file in files if _holds_nothing(Path(file))}
    for file in sorted(empty):
        on_empty(file)
    kept = {str(split): [glob.escape(file) for file in files if file not in empty] for split, files in found.items()}
    return {**options, "data_files": {split: files for split, files in kept.items() if files}} if empty else options


def _escaped(data_files: Any) -> Any:
    """`data_files` with the names of files that are there as such, whatever signs of globs they have."""
    if isinstance(data_files, dict):
        return {split: _escaped(files) for split, files in data_files.items()}
    if isinstance(data_files, list | tuple):
        return [_escaped(file) for file in data_files]
    return glob.escape(data_files) if Path(data_files).is_file() else data_files


def _holds_nothing(file: Path) -> bool:
    """Whether there is nothing but blanks, or a list of nothing, in a file of this machine."""
    try:
        with opened(file) as content:
            first = content.read(_BLANK_BYTES)
    except OSError:
        return False
    return len(first) < _BLANK_BYTES and first.removeprefix(BOM_UTF8).strip() in (b"", b"[]")
