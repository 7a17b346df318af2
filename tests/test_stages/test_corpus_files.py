"""Files as people have them: empty ones, compressed ones, odd names, and columns that nobody asked for."""

import bz2
import datetime as dt
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tristill.stages.data.config import DataConfig
from tristill.stages.data.corpus import documents
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.errors import CheckpointError, CorpusError
from tristill.stages.models.origin import refuse_unwritable_home

WORDS = [f"fox number {n} met the moon" for n in range(60)]
FROM_NOTHING = pa.table({"text": pa.array([], pa.string())})


def texts(*paths: Path | str, kind: str = "records", **settings: Any) -> list[str]:
    source = {"kind": kind, "paths": [str(path) for path in paths], **settings}
    return list(documents(DataConfig.model_validate({"source": source}).source))


def hub_texts(builder: str, *paths: Path) -> list[str]:
    source = {"kind": "hf", "path": builder, "arguments": {"data_files": [str(path) for path in paths]}}
    return list(documents(DataConfig.model_validate({"source": source}).source))


def test_loaders_of_datasets_pass_over_files_of_nothing_however_they_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, content in enumerate([b"", b"\n \n", b"\xef\xbb\xbf", b"[]", gzip.compress(b"")]):
        (folder / f"{number}.jsonl{'.gz' if number == 4 else ''}").write_bytes(content)
    (folder / "notes [v2].jsonl").write_text('{"text": "one"}\n')
    assert hub_texts("json", *sorted(folder.iterdir())) == ["one"]
    for settings in ({"path": "json", "arguments": {"data_files": f"{tmp_path}/*/*.jsonl"}}, {"path": str(folder)}):
        source = {"kind": "hf", **settings}
        empty: list[str] = []
        found = documents(DataConfig.model_validate({"source": source}).source, empty.append)
        assert list(found) == ["one"]
        assert {Path(name).name for name in empty} >= {"0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"}
    (folder / "notes [v2].jsonl").unlink()
    assert hub_texts("json", *sorted(folder.iterdir())) == []


def test_a_parquet_page_that_is_not_what_its_checksum_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": WORDS}), path, write_page_checksum=True, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[content.index(b"fox number 30")] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"a\.parquet: cannot be read .*CRC"):
        texts(path)


def write_table(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return path


def test_a_line_of_blanks_ends_a_paragraph_and_is_no_line_of_text(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_bytes(b" \n = Title = \n \n one\ntwo \n\t\n\n\n \nthree\n")
    assert texts(path, kind="text", documents="paragraph") == [" = Title = ", " one\ntwo ", "three\n"]
    assert texts(path, kind="text", documents="line") == [" = Title = ", " one", "two ", "three"]
    path.write_bytes(b"one\r\ntwo\r\n\r\nthree\rfour\r\rfive")
    assert texts(path, kind="text", documents="paragraph") == ["one\ntwo", "three\nfour", "five"]


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, unit: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert texts(tmp_path / "a.txt", kind="text", documents=unit) == ["one"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert texts(tmp_path / "a.jsonl") == ["one"]


COMPRESSORS = {
    "gz": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: zstandard.compress(data[:9]) + zstandard.compress(data[9:]),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_are_read_whole_and_damaged_ones_refused(tmp_path: Path, suffix: str) -> None:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in WORDS).encode()
    for name, data in (("a.txt", "\n".join(WORDS).encode()), ("a.jsonl", rows)):
        path = tmp_path / f"{name}.{suffix}"
        kind = {"kind": "text", "documents": "line"} if name == "a.txt" else {"kind": "records"}
        path.write_bytes(COMPRESSORS[suffix](data))
        assert texts(path, **kind) == WORDS
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(CorpusError, match=rf"{path.name}: cannot be read \(.*\); replace it or leave it out"):
            texts(path, **kind)


@pytest.mark.parametrize("name", ["notes [v2].txt", "a*b.txt", "q?.txt", "100%.txt", "a::b.txt", "__a.txt", ".h.txt"])
def test_a_file_is_found_by_its_own_name_whatever_signs_are_in_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "texts [new]"
    folder.mkdir()
    (folder / name).write_text("mine")
    (folder / "notes v.txt").write_text("other")
    assert texts(folder / name, kind="text") == ["mine"]
    assert "mine" in texts(folder, kind="text")
    assert "other" in texts(folder / "*.txt", kind="text")
    assert texts(folder / "notes [uvw].txt", kind="text") == ["other"]
    if "?" not in name and "::" not in name:  # of which no URL is made
        assert texts(f"file://{folder}/{name}", kind="text") == ["mine"]


ODD_COLUMNS = {
    "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
    "year 12000": pa.array([253402300800 * 2], pa.timestamp("s")),
    "nanoseconds": pa.array([1700000000123456789], pa.timestamp("ns")),
    "duration": pa.array([2**62], pa.duration("s")),
}


@pytest.mark.parametrize("odd", ODD_COLUMNS)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_beside_the_text_are_not_read(tmp_path: Path, odd: str, suffix: str) -> None:
    table = pa.table({"text": ["one"], "a.b": ODD_COLUMNS[odd]})
    assert texts(write_table(tmp_path / f"a.{suffix}", table)) == ["one"]
    if odd != "map":
        assert hub_texts("parquet", write_table(tmp_path / "b.parquet", table)) == ["one"]


def test_json_rows_may_differ_in_what_stands_beside_the_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.NDJSON"
    path.write_text(
        '{"text": "2024-05-01", "n": 1}\n\n{"n": {"deep": []}, "text": "2024-05-02"}\n{"text": "x", "n": "s"}'
    )
    assert texts(path) == ["2024-05-01", "2024-05-02", "x"]
    (tmp_path / "list.json").write_text('\n [{"text": "a"},\n {"text": "b"}, "c"]')
    assert texts(tmp_path / "list.json") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a"}\n{"text":\n',
            r"rows\.jsonl: row 2 is not JSON \(.*\); expected an object per line, or one list",
        ),
        ('{"text": "a"}\n\n[1]\n', r"rows\.jsonl: row 3: found list, expected a JSON object per line"),
        ('[{"text": "a"}, 5]', r"rows\.jsonl: row 2: found int, expected a JSON object per line"),
        ('{"text": "\\ud83d"}', r"rows\.jsonl: row 1: found half of a surrogate pair"),
        ('{"story": "a"}', r"rows\.jsonl: found no column 'text', expected text in one of \['story'\]"),
        ('{"text": 5}', r"rows\.jsonl: found int in that column, expected text"),
        ("[" * 100_000, r"rows\.jsonl: its list of rows is not JSON"),
    ],
)
def test_json_that_holds_no_rows_is_refused_with_its_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(CorpusError, match=message):
        texts(tmp_path / "rows.jsonl")


def test_tables_that_cannot_serve_are_refused_by_name(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", pa.table({"story": ["one"], "day": [dt.date(2024, 5, 1)]}))
    with pytest.raises(CorpusError, match=r"a\.parquet: found no column 'text' in \['day', 'story'\]"):
        texts(path)
    with pytest.raises(CorpusError, match=r"a\.parquet: found date in that column, expected text"):
        texts(path, text_column="day")
    for name in ("bad.parquet", "bad.arrow"):
        (tmp_path / name).write_bytes(b"no table at all")
        with pytest.raises(CorpusError, match=rf"{name}: cannot be read \(Arrow"):
            texts(tmp_path / name)
    (tmp_path / "rows.csv").write_text("text\none\n")
    with pytest.raises(CorpusError, match=r"rows\.csv: found a file with suffix '\.csv', expected one of \['\.arrow'"):
        texts(tmp_path / "rows.csv")


def test_empty_files_among_good_ones_are_skipped_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    good = folder / "good.jsonl"
    good.write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    nothing = [folder / name for name in ("a.parquet", "b.arrow", "c.jsonl", "d.json", "z.jsonl.gz")]
    for path in nothing:
        path.write_bytes(b"")
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "none.json").write_text("[]")
    write_table(folder / "rows.parquet", FROM_NOTHING)
    write_table(folder / "rows.arrow", FROM_NOTHING)
    assert texts(folder) == WORDS
    config = {
        "source": {"kind": "records", "paths": [str(folder)]},
        "tokenizer": {"kind": "bpe", "vocab_size": 300},
        "context_length": 8,
        "validation_fraction": 0.3,
    }
    tokenize_corpus(DataConfig.model_validate(config), tmp_path / "data")
    said = capsys.readouterr().err
    assert said.count("skipped") == 1
    assert f"tokenize: skipped 9 files that hold nothing: {nothing[0]}" in said


def test_empty_files_of_a_data_set_are_skipped(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    good = write_table(tmp_path / "good.parquet", pa.table({"text": ["one"]}))
    no_rows = write_table(tmp_path / "no_rows.parquet", FROM_NOTHING)
    assert hub_texts("parquet", empty, no_rows, good, no_rows) == ["one"]


def test_a_hub_folder_that_cannot_be_written_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/nowhere/hub")
    problem = ValueError("builder failed")
    problem.__cause__ = PermissionError(13, "Permission denied", "/nowhere/hub/datasets/x.lock")
    with pytest.raises(CheckpointError, match=r"x\.lock: cannot be written \(Permission denied\), .* set HF_HOME in"):
        refuse_unwritable_home(problem)
    refuse_unwritable_home(PermissionError(13, "Permission denied", "/elsewhere/corpus.json"))
