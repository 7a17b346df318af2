"""From text to windows: nothing lost, nothing on both sides, bounded memory, clear refusals."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from conftest import ROOT
from tristill.stages.data.config import DataConfig, TrainedTokenizer
from tristill.stages.data.corpus import documents, is_validation
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.data.tokenized import load_corpus, split_windows
from tristill.stages.data.tokenizer import _BoundedWords, train_tokenizer
from tristill.stages.errors import CorpusError, TokenizerError

STORY = "Once upon a time, no. {n}: a fox met the moon; \U0001f98a caf\u00e9 at\t{n}  o'clock.\n"


def config_for(folder: Path, **changes: object) -> DataConfig:
    settings: dict[str, object] = {
        "source": {"kind": "text", "paths": [str(folder)]},
        "tokenizer": {"kind": "bpe", "vocab_size": 300},
        "context_length": 8,
        "validation_fraction": 0.3,
    }
    return DataConfig.model_validate(settings | changes)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n:02d}.txt").write_text(STORY.format(n=n) * (1 + n % 5), encoding="utf-8")
    return folder


def test_tokens_decode_to_the_documents_of_their_split(corpus: Path, tmp_path: Path) -> None:
    config = config_for(corpus)
    described = tokenize_corpus(config, tmp_path / "data")
    tokenizer = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    texts = list(documents(config.source))
    for split in ("train", "validation"):
        expected = [text for text in texts if is_validation(text, config) == (split == "validation")]
        ids = np.load(tmp_path / "data" / f"{split}.npy")
        ends = np.flatnonzero(ids == described.end_of_text_id)
        found = [tokenizer.decode(part[part != 0].tolist()) for part in np.split(ids, ends + 1) if len(part)]
        assert found == expected
        assert described.splits[split].documents == len(expected)
        assert described.splits[split].text_bytes == sum(len(text.encode()) for text in expected)
        assert described.splits[split].tokens == len(ids)


def test_windows_are_contiguous_and_predict_every_position_once(corpus: Path, tmp_path: Path) -> None:
    tokenize_corpus(config_for(corpus), tmp_path / "data")
    ids = np.load(tmp_path / "data" / "train.npy")
    windows = split_windows(tmp_path / "data", "train")
    rows = windows.read(list(range(windows.num_windows)))
    assert rows.shape == ((len(ids) - 1) // 8, 9)
    np.testing.assert_array_equal(rows[:, :-1].flatten(), ids[: rows.shape[0] * 8])
    np.testing.assert_array_equal(rows[:, 1:].flatten(), ids[1 : rows.shape[0] * 8 + 1])


def test_the_result_is_a_function_of_the_text_alone(corpus: Path, tmp_path: Path) -> None:
    first = tokenize_corpus(config_for(corpus), tmp_path / "a")
    assert tokenize_corpus(config_for(corpus), tmp_path / "b") == first
    assert load_corpus(tmp_path / "b").fingerprint == first.fingerprint
    (corpus / "40.txt").write_text("one more")
    assert tokenize_corpus(config_for(corpus), tmp_path / "c").fingerprint != first.fingerprint


def test_the_split_depends_on_content_only(corpus: Path) -> None:
    config = config_for(corpus)
    texts = list(documents(config.source))
    held_out = [text for text in texts if is_validation(text, config)]
    wider = config_for(corpus, validation_fraction=0.6)
    assert set(held_out) < {text for text in texts if is_validation(text, wider)}


def test_limits_cut_the_splits(corpus: Path, tmp_path: Path) -> None:
    described = tokenize_corpus(config_for(corpus, max_train_tokens=100, max_validation_tokens=50), tmp_path / "data")
    assert {split: counts.tokens for split, counts in described.splits.items()} == {"train": 100, "validation": 50}


def test_paragraphs_and_lines_are_documents_too(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("first\nsecond\n\nthird\n")

    def source(kind: str) -> list[str]:
        changes = {"source": {"kind": "text", "paths": [str(tmp_path / "*.txt")], "documents": kind}}
        return list(documents(config_for(tmp_path, **changes).source))

    assert source("file") == ["first\nsecond\n\nthird\n"]
    assert source("paragraph") == ["first\nsecond", "third\n"]
    assert source("line") == ["first", "second", "third"]


def test_file_names_are_names_not_patterns(tmp_path: Path) -> None:
    for name in ("story[1].txt", "story1.txt", "what?.txt", "star*.txt"):
        (tmp_path / name).write_text(f"this is {name}")
    expected = sorted(f"this is {path.name}" for path in tmp_path.iterdir())
    assert sorted(documents(config_for(tmp_path).source)) == expected


def test_rows_that_do_not_parse_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"text": "fine"}\n{"text": \n')
    source = {"kind": "hf", "path": "json", "arguments": {"data_files": str(path)}}
    with pytest.raises(CorpusError, match="data set 'json', split 'train': cannot be loaded"):
        list(documents(config_for(tmp_path, source=source).source))


def test_the_standard_library_is_real_text_in_a_fixed_order() -> None:
    source = DataConfig().source
    texts = list(documents(source))
    assert texts == list(documents(source))
    assert sum(map(len, texts)) > 5_000_000
    assert any("The Zen of Python" in text for text in texts) or any("Gur Mra bs Clguba" in text for text in texts)


@pytest.mark.parametrize("builder", ["json", "parquet"])
def test_hugging_face_builders_read_local_files(tmp_path: Path, builder: str) -> None:
    import datasets

    rows = {"story": [STORY.format(n=n) for n in range(30)], "id": list(range(30))}
    path = tmp_path / f"data.{builder}"
    getattr(datasets.Dataset.from_dict(rows), f"to_{builder}")(path)
    source = {"kind": "hf", "path": builder, "text_column": "story", "arguments": {"data_files": str(path)}}
    assert list(documents(config_for(tmp_path, source=source).source)) == rows["story"]
    wrong = config_for(tmp_path, source={**source, "text_column": "text"}).source
    numbers = config_for(tmp_path, source={**source, "text_column": "id"}).source
    with pytest.raises(CorpusError, match=r"found int in that column, expected text"):
        list(documents(numbers))
    with pytest.raises(CorpusError, match=r"found no column 'text', expected text in one of \['id', 'story'\]"):
        list(documents(wrong))


def test_an_existing_tokenizer_is_used_as_it_is(corpus: Path, tmp_path: Path) -> None:
    tokenize_corpus(config_for(corpus), tmp_path / "data")
    own = tmp_path / "data" / "tokenizer.json"
    for path in (own, own.parent):
        config = config_for(corpus, tokenizer={"kind": "file", "path": str(path)})
        tokenize_corpus(config, tmp_path / "again")
        assert (tmp_path / "again" / "train.npy").read_bytes() == (tmp_path / "data" / "train.npy").read_bytes()
    with pytest.raises(TokenizerError, match=r"found no token '</s>'; set data.tokenizer.end_of_text .*<\|endof"):
        tokenize_corpus(
            config_for(corpus, tokenizer={"kind": "file", "path": str(own), "end_of_text": "</s>"}), tmp_path / "x"
        )
    own.write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        tokenize_corpus(config_for(corpus, tokenizer={"kind": "file", "path": str(own)}), tmp_path / "x")


def test_large_vocabularies_take_four_bytes_an_id(corpus: Path, tmp_path: Path) -> None:
    tokenize_corpus(config_for(corpus), tmp_path / "data")
    described = json.loads((tmp_path / "data" / "tokenizer.json").read_text())
    vocab = described["model"]["vocab"]
    vocab |= {f"<unused {i}>": i for i in range(len(vocab), 70_000)}
    (tmp_path / "large.json").write_text(json.dumps(described))
    config = config_for(corpus, tokenizer={"kind": "file", "path": str(tmp_path / "large.json")})
    assert tokenize_corpus(config, tmp_path / "wide").vocab_size == 70_000
    assert np.load(tmp_path / "wide" / "train.npy").dtype == np.uint32


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ({}, {}, r"found no file there; data\.source\.paths takes files, folders and globs"),
        ({"a.txt": b""}, {}, r"the corpus \(text\) is empty: found no text in it"),
        (
            {"a.txt": b"short"},
            {},
            r"split is shorter than one window: found \d documents of \d+ tokens in all, expected at least 9",
        ),
        ({"a.txt": b"fine", "b.txt": b"\xff\xfe\x00bad"}, {}, r"b\.txt: is not UTF-8 text"),
    ],
)
def test_bad_corpora_are_refused_and_leave_nothing(
    tmp_path: Path, content: dict[str, bytes], changes: dict[str, object], message: str
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    with pytest.raises(CorpusError, match=message):
        tokenize_corpus(config_for(folder, **changes), tmp_path / "data")
    assert not list((tmp_path / "data").glob("*.npy"))
    assert not (tmp_path / "data" / "data.json").exists()


def test_damaged_token_files_are_refused(corpus: Path, tmp_path: Path) -> None:
    tokenize_corpus(config_for(corpus), tmp_path / "data")
    path = tmp_path / "data" / "train.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CorpusError, match=r"train\.npy: cannot be read as token ids .* run `tristill tokenize` again"):
        split_windows(tmp_path / "data", "train")
    path.write_bytes(b"")
    with pytest.raises(CorpusError, match=r"train\.npy: cannot be read as token ids"):
        split_windows(tmp_path / "data", "train")
    (tmp_path / "data" / "data.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"data\.json: cannot be read as a tokenized corpus"):
        load_corpus(tmp_path / "data")


MEMORY_PROGRAM = """
import sys
from pathlib import Path
from tristill.stages.data.config import DataConfig
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.resources import peak_rss_mib
source = {"kind": "text", "paths": [sys.argv[1]], "documents": "paragraph"}
tokenizer = {"kind": "bpe", "vocab_size": 400, "train_bytes": 1_000_000}
tokenize_corpus(DataConfig.model_validate({"source": source, "tokenizer": tokenizer}), Path(sys.argv[2]))
print(peak_rss_mib())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Three times the text, more by far than the allowed growth; below some 20 MiB the libraries' buffers still fill."""
    words = re.findall(r"\w+", (ROOT / "docs" / "format.md").read_text())
    generator = np.random.default_rng(0)
    peaks = []
    for size_mib in (24, 72):
        path = tmp_path / f"{size_mib}.txt"
        with path.open("w") as file:
            while file.tell() < size_mib * 2**20:
                file.write(" ".join(generator.choice(words, 50_000)).replace("the ", "the\n\n") + "\n\n")
        done = subprocess.run(
            [sys.executable, "-c", MEMORY_PROGRAM, str(path), str(tmp_path / "data")],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        peaks.append(float(done.stdout))
    assert peaks[1] - peaks[0] < 20, f"peaks {peaks} MiB"


def test_text_without_spaces_trains_a_tokenizer_and_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    """Without the bound on words this takes the square of their length: minutes."""
    letters = "".join(np.random.default_rng(0).choice(list("ACGT"), 150_000))
    tokenizer = train_tokenizer(TrainedTokenizer(vocab_size=400), [letters, "#" * 2000, "1" * 2000, " " * 2000])
    assert tokenizer.get_vocab_size() == 400
    ids = tokenizer.encode(letters).ids
    assert tokenizer.decode(ids) == letters
    assert len(ids) < len(letters) / 2
    assert "tokenizer: cut 4 words of more than 512 characters to train on" in capsys.readouterr().err


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=40) | st.integers(1, 512).map("-".__mul__), min_size=1, max_size=4))
def test_bounded_words_change_no_ordinary_text(texts: list[str]) -> None:
    assert list(_BoundedWords(texts)) == texts
    long = [text + "x" * 1030 for text in texts]
    assert "".join(_BoundedWords(long)) == "".join(long)


INTERRUPTED_PROGRAM = """
from tristill.stages.data.config import TrainedTokenizer
from tristill.stages.data.tokenizer import train_tokenizer
print("begun", flush=True)
try:
    train_tokenizer(TrainedTokenizer(vocab_size=60_000), ("".join(chr(97 + (i * i + j) % 26) for i in range(500)) for j in range(20_000)))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    import os
    os._exit(130)
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_training_of_a_tokenizer(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED_PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        time.sleep(6)  # well within the library by now
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 130
        assert child.stdout.read() == "interrupted\n"
