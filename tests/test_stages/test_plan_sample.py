"""Samples of a corpus: windows are windows of the whole, and what is counted from them is near the truth."""

from pathlib import Path

import numpy as np
import pytest
from chats import chat_settings, make_tokenizer, some_chats, write_json_lines

from conftest import ROOT
from tristill.cache.hashing import sha256_of_file
from tristill.cache.manifest import load_manifest
from tristill.pipeline.config import load_config
from tristill.pipeline.plan.sizes import cache_sizes, scaled
from tristill.stages.data.config import DataConfig, TextFiles, TrainedTokenizer
from tristill.stages.data.files import corpus_files
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.data.tokenized import load_corpus, mask_name, split_windows
from tristill.stages.dump.dump import dump_logits
from tristill.stages.errors import CorpusError
from tristill.stages.plan.corpus import expected_tokens, in_small
from tristill.stages.plan.sample import sample_corpus

EVERYTHING = {"train": 2**62, "validation": 2**62}


def test_windows_of_a_sample_are_windows_of_the_corpus(finished_run: Path, tmp_path: Path) -> None:
    data = finished_run / "data"
    sample = sample_corpus(data, tmp_path / "data", {"train": 256, "validation": 2**62}, EVERYTHING)
    whole, part = (split_windows(folder, "train") for folder in (data, tmp_path / "data"))
    assert (part.num_windows, sample.context_length) == (256, 32)
    inputs = {bytes(whole.read([i])[0, :-1].tobytes()) for i in range(whole.num_windows)}
    windows = part.read(np.arange(part.num_windows))
    assert all(bytes(window[:-1].tobytes()) in inputs for window in windows)
    with_label = {bytes(whole.read([i])[0].tobytes()) for i in range(whole.num_windows)}
    assert sum(bytes(window.tobytes()) not in with_label for window in windows) <= 1
    assert (tmp_path / "data" / "validation.npy").is_symlink()
    assert sample.splits["validation"] == load_corpus(data).splits["validation"]
    assert sample.splits["train"].bytes_per_token == pytest.approx(
        load_corpus(data).splits["train"].bytes_per_token, 0.01
    )


def test_a_sample_stays_within_the_windows_that_are_seen(finished_run: Path, tmp_path: Path) -> None:
    data = finished_run / "data"
    sample_corpus(data, tmp_path / "data", {"train": 2**62, "validation": 1}, {**EVERYTHING, "train": 10})
    whole, part = (split_windows(folder, "train") for folder in (data, tmp_path / "data"))
    assert (part.read(np.arange(10)) == whole.read(np.arange(10))).all()
    assert part.num_windows == 10
    assert split_windows(tmp_path / "data", "validation").num_windows == 1


@pytest.mark.parametrize("profile", ["transform", "sampled"])
def test_a_sample_of_a_third_tells_the_bytes_of_all_within_ten_percent(
    finished_run: Path, tmp_path: Path, profile: str
) -> None:
    changes = (f"cache.profile={{kind='{profile}'}}", "cache.hidden_layers=[]", "distill.hidden.weight=0.0")
    config = load_config(ROOT / "configs" / "test.toml", changes).cache
    data, teacher = finished_run / "data", finished_run / "teacher"
    sample_corpus(data, tmp_path / "data", {"train": 128, "validation": 2**62}, {**EVERYTHING, "train": 400})
    dump_logits(config, data, teacher, tmp_path / "whole")
    dump_logits(config.model_copy(update={"max_train_windows": None}), tmp_path / "data", teacher, tmp_path / "part")
    happened = cache_sizes(tmp_path / "whole", "")
    assert load_manifest(tmp_path / "part").spec.splits["train"].num_windows == 128
    predicted = scaled(tmp_path / "part", happened.positions, "")
    assert predicted.total_bytes == pytest.approx(happened.total_bytes, rel=0.1)
    assert sum(predicted.dataset_bytes.values()) == pytest.approx(sum(happened.dataset_bytes.values()), rel=0.1)


def test_a_part_of_many_files_tells_the_tokens_of_all(tmp_path: Path) -> None:
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in corpus_files(DataConfig().source)[:40])
    (tmp_path / "text").mkdir()
    for n in range(60):
        (tmp_path / "text" / f"{n:02}.txt").write_text(text[n * 4000 : (n + 1) * 4000], encoding="utf-8")
    config = DataConfig(
        source=TextFiles(kind="text", paths=(str(tmp_path / "text"),), documents="paragraph"),
        tokenizer=TrainedTokenizer(vocab_size=400),
        context_length=16,
        validation_fraction=0.2,
    )
    small = in_small(config, small_bytes=120_000)
    assert not small.is_whole
    assert len(small.config.source.paths) == 15
    whole = tokenize_corpus(config, tmp_path / "whole")
    tokenize_corpus(small.config, tmp_path / "part")
    found = expected_tokens(config, small, tmp_path / "part")
    assert found["train"] == pytest.approx(whole.splits["train"].tokens, rel=0.1)
    assert sum(found.values()) == pytest.approx(sum(split.tokens for split in whole.splits.values()), rel=0.05)
    limited = config.model_copy(update={"max_train_tokens": 1000, "max_validation_tokens": 500})
    assert expected_tokens(limited, small, tmp_path / "part") == {"train": 1000, "validation": 500}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Path]:
    """The settings of twenty files of chats, and the folder of their tokens."""
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    folder = tmp_path_factory.mktemp("chats")
    (folder / "rows").mkdir()
    rows = [{"messages": chat, "note": "not read"} for chat in some_chats(400)]
    for n in range(20):
        write_json_lines(folder / "rows" / f"[{n:02}].jsonl", rows[n::20])
    config = DataConfig.model_validate(chat_settings(folder / "rows", make_tokenizer(folder / "tokenizer")))
    tokenize_corpus(config, folder / "data")
    return config, folder / "data"


def test_a_sample_of_chats_counts_what_the_corpus_counts(chats: tuple[DataConfig, Path], tmp_path: Path) -> None:
    data = chats[1]
    sample = sample_corpus(data, tmp_path / "data", {"train": 600, "validation": 2**62}, EVERYTHING)
    assert load_corpus(tmp_path / "data") == sample
    whole, part = (split_windows(folder, "train") for folder in (data, tmp_path / "data"))
    assert part.num_windows == 1024 < whole.num_windows
    places: dict[bytes, list[int]] = {}
    for place in range(whole.num_windows):
        places.setdefault(whole.read([place])[0].tobytes(), []).append(place)
    num_wrong = 0
    for place in range(part.num_windows):
        found = places.get(part.read([place])[0].tobytes(), [])
        num_wrong += not any((whole.mask([there]) == part.mask([place])).all() for there in found)
    assert num_wrong <= 1  # where the two runs meet
    found, of = sample.splits["train"], load_corpus(data).splits["train"]
    assert found.counted is not None
    assert found.counted.tokens == np.load(tmp_path / "data" / mask_name("train")).sum() < 0.4 * found.tokens
    assert found.counted.sha256 == sha256_of_file(tmp_path / "data" / mask_name("train"))
    assert found.bytes_per_token == pytest.approx(of.bytes_per_token, rel=1e-3)
    assert (tmp_path / "data" / mask_name("validation")).is_symlink()
    assert sample.splits["validation"] == load_corpus(data).splits["validation"]


def test_a_part_of_many_record_files_is_records_and_tells_the_tokens_of_all(
    chats: tuple[DataConfig, Path], tmp_path: Path
) -> None:
    config, data = chats
    total = sum(file.stat().st_size for file in corpus_files(config.source))
    small = in_small(config, small_bytes=total - 1)
    assert small.config.source == config.source.model_copy(update={"paths": small.config.source.paths})
    assert len(small.config.source.paths) == 9
    tokenize_corpus(small.config, tmp_path / "part")
    whole, found = load_corpus(data).splits, expected_tokens(config, small, tmp_path / "part")
    assert sum(found.values()) == pytest.approx(sum(split.tokens for split in whole.values()), rel=0.1)
    assert found["train"] == pytest.approx(whole["train"].tokens, rel=0.1)


def test_few_large_record_files_need_a_limit(tmp_path: Path) -> None:
    rows = write_json_lines(tmp_path / "rows.jsonl", [{"text": "the moon met a fox", "note": n} for n in range(300)])
    config = DataConfig.model_validate({"source": {"kind": "records", "paths": [str(rows)]}})
    with pytest.raises(CorpusError, match=r"^record files \(1, .* set data.max_train_tokens, or run `tristill"):
        in_small(config, small_bytes=1000)
    limited = in_small(config.model_copy(update={"max_train_tokens": 5000}), small_bytes=1000)
    assert (limited.config.source, limited.config.max_train_tokens) == (config.source, 5000)
    assert limited.is_limited
