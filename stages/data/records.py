"""Rows of record files: JSON lines, Parquet and Arrow; of a table only the columns that are asked for are read."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.text_files import COMPRESSED_SUFFIXES, opened_text
from stages.errors import CorpusError

Row = dict[str, Any]
_BATCH_ROWS = 1024


def record_rows(path: Path, where: str, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a record file, those of tables with these columns alone, as far as they are there.

    The format is told by the suffix of `where`, the file's own name. Raises CorpusError for what cannot be read.
    """
    yield from _READERS[_suffix(where)](path, where, columns)


def is_record_file(where: str) -> bool:
    """Whether a file of this name is read as records."""
    return _suffix(where) in _READERS


def _suffix(where: str) -> str:
    name = Path(where)
    compressed = name.suffix.lower() in COMPRESSED_SUFFIXES
    suffix = Path(name.stem if compressed else name).suffix.lower()
    return "" if compressed and suffix in _TABLES else suffix


def _json_rows(path: Path, where: str, columns: Sequence[str]) -> Iterator[Row]:
    """An object per line, or one list of objects; text in place of an object is the first of `columns`."""
    with opened_text(path, where) as text:
        first = next((line for line in text if line.strip()), "")
        if first.lstrip().startswith("["):
            found = _parsed(first + text.read(), where, "its list of rows")
            rows = ((f"row {number}", row) for number, row in enumerate(found, start=1))
        else:
            lines = (line for part in ([first], text) for line in part)
            rows = (
                (f"row {number}", _parsed(line, where, f"row {number}"))
                for number, line in enumerate(filter(str.strip, lines), start=1)
            )
        for place, row in rows:
            if not isinstance(row, dict | str):
                raise CorpusError(f"{where}: {place}: found {type(row).__name__}, expected a JSON object per line")
            yield row if isinstance(row, dict) else {columns[0]: row}


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
    with pq.ParquetFile(path) as file:
        wanted = _wanted(file.schema_arrow, where, columns)
        for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
            yield from batch.select(wanted).to_pylist()


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
                yield from batch.select(wanted).slice(first, _BATCH_ROWS).to_pylist()


def _wanted(schema: pa.Schema, where: str, columns: Sequence[str]) -> list[str]:
    found = [name for name in columns if name in schema.names]
    if not found:
        raise CorpusError(
            f"{where}: found no column {columns[0]!r} in {sorted(schema.names)}; set data.source.text_column or "
            "chat_column"
        )
    return found


def _of_a_table(rows: Callable[[Path, str, Sequence[str]], Iterator[Row]]) -> Callable[..., Iterator[Row]]:
    """The same for a file that may be empty, with what pyarrow raises told by the file's name."""

    def guarded(path: Path, where: str, columns: Sequence[str]) -> Iterator[Row]:
        if not path.stat().st_size:
            return
        try:
            yield from rows(path, where, columns)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as exc:
            raise CorpusError(f"{where}: cannot be read ({type(exc).__name__}: {exc})") from exc

    return guarded


_TABLES = {".parquet": _of_a_table(_parquet_rows), ".arrow": _of_a_table(_arrow_rows)}
_READERS = dict.fromkeys([".jsonl", ".json", ".ndjson"], _json_rows) | _TABLES
RECORD_SUFFIXES = sorted(_READERS)
