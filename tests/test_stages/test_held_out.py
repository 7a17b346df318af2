"""Held-out text of its own, and windows that begin as the model was trained to begin."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tristill.stages.data.config import DataConfig
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.data.tokenized import load_corpus, split_windows
from tristill.stages.data.tokens import TokenWindows, token_file
from tristill.stages.errors import CorpusError, TokenizerError

UNKNOWN, BOS, END, *LETTERS = WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "d"]
CYCLE = [3, 4, 5, 6, 2]


def letters_tokenizer(folder: Path, *, adds_bos: bool = True, **settings: Any) -> Path:
    """A word a letter, in a Hugging Face folder; the post-processor puts <s> before a text."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, UNKNOWN))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:3]])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 1)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def config_of(tmp_path: Path, folder: Path, **settings: Any) -> DataConfig:
    """Lines of the same five tokens, held out by a file of their own."""
    for name, count in (("train", 40), ("valid", 12), ("test", 8)):
        (tmp_path / f"{name}.txt").write_text("a b c d\n" * count)

    def lines(name: str) -> dict[str, Any]:
        return {"kind": "text", "paths": [str(tmp_path / f"{name}.txt")], "documents": "line"}

    given = {"kind": "file", "path": str(folder), "end_of_text": END} | settings.pop("tokenizer", {})
    fields = {"source": lines("train"), "validation": lines("valid"), "test": lines("test"), "context_length": 8}
    return DataConfig.model_validate(fields | {"tokenizer": given} | settings)


def test_sources_of_held_out_text_are_their_splits_whole_and_nothing_else(tmp_path: Path) -> None:
    config = config_of(tmp_path, letters_tokenizer(tmp_path / "tok"))
    corpus = tokenize_corpus(config, tmp_path / "data")
    assert {split: found.documents for split, found in corpus.splits.items()} == {
        "train": 40,
        "validation": 12,
        "test": 8,
    }
    np.testing.assert_array_equal(np.load(tmp_path / "data" / "test.npy"), CYCLE * 8)
    only_test = config.model_copy(update={"validation": None})
    with pytest.raises(CorpusError, match=r"the validation split .* found 0 documents of 0 tokens in all"):
        tokenize_corpus(only_test, tmp_path / "data")  # equal lines are all on one side
    limited = config.model_copy(update={"max_train_tokens": 50, "max_validation_tokens": 20})
    found = tokenize_corpus(limited, tmp_path / "data").splits
    assert [found[split].tokens for split in ("train", "validation", "test")] == [50, 20, 40]


def test_a_split_that_is_too_short_tells_what_was_found_and_what_to_change(tmp_path: Path) -> None:
    config = config_of(tmp_path, letters_tokenizer(tmp_path / "tok", adds_bos=False))
    (tmp_path / "valid.txt").write_text("a b\n")
    with pytest.raises(
        CorpusError,
        match=r"validation split is shorter than one window: found 1 documents of 3 tokens in all, expected at least 9 "
        r"tokens; give more text in data\.validation, or lower data\.context_length",
    ):
        tokenize_corpus(config, tmp_path / "data")
    whole = config.source.model_copy(update={"documents": "file"})
    with pytest.raises(
        CorpusError,
        match=r"found [01] documents of .* raise data\.validation_fraction, name held-out text of its own in "
        r"data\.validation, or set data\.source\.documents to 'paragraph' or 'line'",
    ):
        tokenize_corpus(config.model_copy(update={"source": whole, "validation": None}), tmp_path / "data")
    with pytest.raises(CorpusError, match=r"raise data\.max_train_tokens from 5, or lower data\.context_length"):
        tokenize_corpus(config_of(tmp_path, tmp_path / "tok", max_train_tokens=5), tmp_path / "data")


def test_chats_are_not_held_out_by_plain_text(tmp_path: Path) -> None:
    chats = {"kind": "records", "paths": ["x.jsonl"], "chat_column": "messages"}
    with pytest.raises(ValueError, match=r"test: found chats, expected plain text as in source; give chat_column for"):
        config_of(tmp_path, tmp_path, test=chats)


@pytest.mark.parametrize(
    ("adds_bos", "settings", "given", "expected"),
    [
        (True, {}, {}, 1),
        (False, {}, {}, None),
        (False, {"add_bos_token": True, "bos_token": BOS}, {}, 1),
        (False, {"add_bos_token": True, "bos_token": {"content": BOS}}, {}, 1),
        (True, {"add_bos_token": False, "bos_token": BOS}, {}, None),
        (True, {}, {"bos_token": False}, None),
        (False, {}, {"bos_token": UNKNOWN}, 0),
    ],
)
def test_windows_begin_with_what_the_tokenizer_puts_before_a_text(
    tmp_path: Path, adds_bos: bool, settings: dict[str, Any], given: dict[str, Any], expected: int | None
) -> None:
    config = config_of(tmp_path, letters_tokenizer(tmp_path / "tok", adds_bos=adds_bos, **settings), tokenizer=given)
    corpus = tokenize_corpus(config, tmp_path / "data")
    assert corpus == load_corpus(tmp_path / "data")
    assert corpus.bos_id == expected
    windows, ids = split_windows(tmp_path / "data", "train"), np.array(CYCLE * 40)
    rows = windows.read(range(windows.num_windows))
    if expected is None:
        assert "bos_id" not in (tmp_path / "data" / "data.json").read_text()
        assert windows.num_windows == 24
        np.testing.assert_array_equal(rows[:, :-1].flatten(), ids[: 24 * 8])
    else:
        assert windows.num_windows == corpus.num_windows("train") == 25
        np.testing.assert_array_equal(rows[:, 0], expected)
        np.testing.assert_array_equal(rows[:, 1:].flatten(), ids)  # every token is a label once


def test_a_token_that_is_not_there_begins_no_windows(tmp_path: Path) -> None:
    config = config_of(tmp_path, letters_tokenizer(tmp_path / "tok"), tokenizer={"bos_token": "<bos>"})
    with pytest.raises(TokenizerError, match=r"found no token '<bos>' to begin windows with; set data\.tokenizer\.bos"):
        tokenize_corpus(config, tmp_path / "data")


def test_a_window_that_begins_with_a_chat_has_one_beginning(tmp_path: Path) -> None:
    ids, mask = [1, 3, 4, 5, 6, 3, 4, 5, 1, 3, 4, 5], [0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1]
    for name, values, dtype in (("ids", ids, "<u2"), ("mask", mask, "|u1")):
        with token_file(tmp_path / f"{name}.npy", dtype) as file:
            file.append(values)
    windows = TokenWindows(tmp_path / "ids.npy", 4, mask_path=tmp_path / "mask.npy", bos_id=1)
    np.testing.assert_array_equal(windows.read([0, 1, 2]), [[1, 3, 4, 5, 6], [1, 6, 3, 4, 5], [1, 1, 3, 4, 5]])
    counts = windows.mask([0, 1, 2])
    assert counts is not None
    np.testing.assert_array_equal(counts, [[0, 1, 1, 1], [1, 0, 0, 1], [0, 0, 1, 1]])
    np.testing.assert_array_equal(windows.counts(), counts.sum(axis=1))


def nothing_without_bos(folder: Path) -> None:
    """A Llama that knows the next of the cycle if <s> began the window, and else is sure of the letter it just read.

    Attention is uniform and adds the share of <s>, which opens the gates of an MLP that maps a letter to the next.
    """
    import torch
    import transformers

    size = 8
    shape = {"hidden_size": size, "intermediate_size": size, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(
        vocab_size=7, num_hidden_layers=1, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, **shape
    )
    model = transformers.LlamaForCausalLM(config)
    block = model.model.layers[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (block.input_layernorm, block.post_attention_layernorm, model.model.norm):
            norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(7, size))
        block.self_attn.v_proj.weight[1, 1] = block.self_attn.o_proj.weight[1, 1] = 1
        block.mlp.gate_proj.weight[:, 1] = 100
        for now, following in zip(CYCLE, CYCLE[1:] + CYCLE[:1], strict=True):
            block.mlp.up_proj.weight[now, now] = 100
            block.mlp.down_proj.weight[following, now] = 100
            model.lm_head.weight[now, now] = 20
    model.save_pretrained(folder)


def test_a_teacher_that_is_nothing_without_bos_is_right_through_dump_evaluate_and_generate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from tristill.cache import open_cache
    from tristill.stages.dump.config import DumpConfig
    from tristill.stages.dump.dump import dump_logits
    from tristill.stages.evaluate.config import EvaluateConfig
    from tristill.stages.evaluate.evaluate import evaluate
    from tristill.stages.generate.text import generate_text
    from tristill.stages.models.checkpoint import load_model, new_model, save_model
    from tristill.stages.models.description import ModelConfig
    from tristill.stages.targets.cached import CachedSource
    from tristill.stages.teacher.config import TeacherConfig
    from tristill.stages.teacher.given import take_teacher

    given = letters_tokenizer(tmp_path / "given")
    nothing_without_bos(given)
    teacher = TeacherConfig(path=given)
    tokenize_corpus(config_of(tmp_path, given), tmp_path / "data")
    (tmp_path / "teacher").mkdir()
    known = take_teacher(teacher, tmp_path / "data", tmp_path / "teacher", "cpu", EvaluateConfig()).validation
    # Of what follows <s> alone nothing is known: all seven are as likely. All the rest is.
    assert known.loss_nats == pytest.approx(math.log(7) / 8, abs=1e-3)
    summary = json.loads((tmp_path / "teacher" / "summary.json").read_text())
    assert summary["test"]["loss_nats"] == pytest.approx(known.loss_nats, abs=1e-6)
    assert (summary["validation"]["positions"], summary["test"]["positions"]) == (56, 40)
    assert known.bits_per_byte == pytest.approx(known.loss_nats / math.log(2) * 5 / 7, rel=1e-6)  # 7 bytes, 5 tokens
    config = DumpConfig.model_validate({"profile": {"kind": "plain_topk", "top_k": 7}})
    dump_logits(config, tmp_path / "data", tmp_path / "teacher", tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert cache.spec.bos_id == 1
    assert set(cache.spec.splits) == {"train", "validation", "test"}
    source = CachedSource(cache, torch.device("cpu"))
    cached = evaluate(load_model(tmp_path / "teacher"), source, EvaluateConfig(), "teacher")
    assert cached.loss_nats == pytest.approx(known.loss_nats, abs=1e-6)
    assert cached.kl_to_teacher_nats == pytest.approx(0, abs=1e-3)
    told: list[str] = []
    options: dict[str, Any] = {"top_p": 1.0, "seed": 0, "max_tokens": 3, "on_done": told.append}
    written = generate_text(tmp_path / "teacher", "a b", temperature=0, **options)
    assert "".join(written) == "a bcd"  # and the end of text
    shape = ModelConfig(width=8, layers=1, heads=1, kv_heads=1, mlp_width=8)
    save_model(tmp_path / "student", new_model(shape, 7, None, 0), source.tokenizer_path, 8, 2, bos_id=source.bos_id)
    list(generate_text(tmp_path / "student", "<s> a", temperature=0, **options))
    list(generate_text(tmp_path / "student", "a", temperature=0, **options))
    assert [text.partition(" of prompt")[0].split()[-1] for text in told] == ["2", "1", "1"]

    tokenize_corpus(config_of(tmp_path, given, tokenizer={"bos_token": False}), tmp_path / "bare")
    bare = take_teacher(teacher, tmp_path / "bare", tmp_path / "teacher", "cpu", EvaluateConfig()).validation
    assert bare.perplexity > 1e9
    assert "warning: " in (said := capsys.readouterr().err)
    assert "its tokenizer puts <s> before a text, and windows here begin without" in said


def test_ids_beyond_a_models_rows_matter_only_where_they_occur(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tristill.cache import open_cache
    from tristill.stages.dump.config import DumpConfig
    from tristill.stages.dump.dump import dump_logits
    from tristill.stages.evaluate.config import EvaluateConfig
    from tristill.stages.generate.text import generate_text
    from tristill.stages.teacher.config import TeacherConfig
    from tristill.stages.teacher.given import take_teacher

    given = letters_tokenizer(tmp_path / "given")
    tokenizer = Tokenizer.from_file(str(given / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True), AddedToken("<pad>", special=True)])
    tokenizer.save(str(given / "tokenizer.json"))
    nothing_without_bos(given)
    data, teacher = tmp_path / "data", tmp_path / "teacher"
    teacher.mkdir()
    assert tokenize_corpus(config_of(tmp_path, given), data).vocab_size == 9
    take_teacher(TeacherConfig(path=given), data, teacher, "cpu", EvaluateConfig())
    assert "teacher: knows 7 of the 9 ids of its tokenizer; no other occurs" in capsys.readouterr().err
    dump = DumpConfig.model_validate({"profile": {"kind": "plain_topk", "top_k": 7}})
    dump_logits(dump, data, teacher, tmp_path / "cache")
    assert open_cache(tmp_path / "cache").spec.vocab_size == 7
    options: dict[str, Any] = {"temperature": 0, "top_p": 1.0, "seed": 0, "max_tokens": 3}
    with pytest.raises(TokenizerError, match=r"found id 7 \('<image>'\), expected less than 7"):
        list(generate_text(given, "a <image>", **options))

    config = config_of(tmp_path, given)
    (tmp_path / "test.txt").write_text("a b c d\n" * 8 + "a <image> b\n")
    tokenize_corpus(config, data)
    for read in (
        lambda: take_teacher(TeacherConfig(path=given), data, teacher, "cpu", EvaluateConfig()),
        lambda: dump_logits(dump, data, teacher, tmp_path / "other"),
    ):
        with pytest.raises(
            CorpusError, match=r"has rows for 7 ids, and the tokens in .* hold id 7 \('<image>'\); give"
        ):
            read()
