"""Rows of record files: JSON lines, Parquet and Arrow; of a table only the columns that are asked for are read."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tristill.stages.data.text_files import COMPRESSED_SUFFIXES, opened_text
from tristill.stages.errors import CorpusError

Row = dict[str, Any]
_BATCH_ROWS = 1024


def record_rows(path: Path, where: str, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """The rows of a record file with their numbers, those of tables with these columns alone, as far as they are there.

    Numbers begin with 1; of JSON lines they are those of the lines. The format is told by the suffix of `where`, the
    file's own name. Raises CorpusError for what cannot be read.
    """
    yield from _READERS[_suffix(where)](path, where, columns)


def is_table(where: str) -> bool:
    """Whether a record file of this name has columns, which fill what a row lacks with nulls."""
    return _suffix(where) in _TABLES


def is_record_file(where: str) -> bool:
    """Whether a file of this name is read as records."""
    return _suffix(where) in _READERS


def _suffix(where: str) -> str:
    name = Path(where)
    compressed = name.suffix.lower() in COMPRESSED_SUFFIXES
    suffix = Path(name.stem if compressed else name).suffix.lower()
    return "" if compressed and suffix in _TABLES else suffix


def _json_rows(path: Path, where: str, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """An object per line, or one list of objects; text in place of an object is the first of `columns`."""
    with opened_text(path, where) as text:
        lines = ((number, line) for number, line in enumerate(text, start=1) if line.strip())
        number, first = next(lines, (1, ""))
        rows: Iterator[tuple[int, Any]]
        if first.lstrip().startswith("["):
            rows = enumerate(_parsed(first + text.read(), where, "its list of rows"), start=1)
        elif first:
            rows = ((number, _parsed(line, where, f"row {number}")) for number, line in chain([(number, first)], lines))
        else:
            return
        for number, row in rows:
            if not isinstance(row, dict | str):
                raise CorpusError(f"{where}: row {number}: found {type(row).__name__}, expected a JSON object per line")
            yield number, row if isinstance(row, dict) else {columns[0]: row}


def _parsed(content: str, where: str, place: str) -> Any:
    try:
        value = json.loads(content)
        if "\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as exc:
        raise CorpusError(
            f"{where}: {place}: found half of a surrogate pair, which is no character; correct the row or leave it out"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise CorpusError(
            f"{where}: {place} is not JSON ({exc}); expected an object per line, or one list of objects"
        ) from exc
    return value


def _parquet_rows(path: Path, where: str, columns: Sequence[str]) -> Iterator[Row]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        wanted = _wanted(file.schema_arrow, where, columns)
        for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
            yield from batch.select(wanted).to_pylist(maps_as_pydicts="strict")


def _arrow_rows(path: Path, where: str, columns: Sequence[str]) -> Iterator[Row]:
    with pa.memory_map(str(path)) as content:
        try:
            batches: Any = pa.ipc.open_stream(content)
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(content)
            batches = map(file.get_batch, range(file.num_record_batches))
            schema = file.schema
        else:
            schema = batches.schema
        wanted = _wanted(schema, where, columns)
        for batch in batches:
            batch.select(wanted).validate(full=True)
            for first in range(0, batch.num_rows, _BATCH_ROWS):
                rows = batch.select(wanted).slice(first, _BATCH_ROWS)
                yield from rows.to_pylist(maps_as_pydicts="strict")


def _wanted(schema: pa.Schema, where: str, columns: Sequence[str]) -> list[str]:
    found = [name for name in columns if name in schema.names]
    if not found:
        raise CorpusError(
            f"{where}: found no column {columns[0]!r} in {sorted(schema.names)}; set data.source.text_column or "
            "chat_column"
        )
    return found


def _of_a_table(
    rows: Callable[[Path, str, Sequence[str]], Iterator[Row]],
) -> Callable[[Path, str, Sequence[str]], Iterator[tuple[int, Row]]]:
    """The same for a file that may be empty, with what pyarrow raises told by the file's name."""

    def guarded(path: Path, where: str, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
        if not path.stat().st_size:
            return
        try:
            yield from enumerate(rows(path, where, columns), start=1)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as exc:
            raise CorpusError(f"{where}: cannot be read ({type(exc).__name__}: {exc})") from exc

    return guarded


_TABLES = {".parquet": _of_a_table(_parquet_rows), ".arrow": _of_a_table(_arrow_rows)}
_READERS = dict.fromkeys([".jsonl", ".json", ".ndjson"], _json_rows) | _TABLES
RECORD_SUFFIXES = sorted(_READERS)
