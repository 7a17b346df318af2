"""Chats and record files: what is read, which tokens count, and what is refused."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chats import (
    BARE_TEMPLATE,
    FORGETFUL_TEMPLATE,
    HELLO,
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    REASONING_TEMPLATE,
    UNKNOWN_TEMPLATES,
    Chat,
    chat_settings,
    make_tokenizer,
    some_chats,
    write_json_lines,
)
from pydantic import ValidationError
from tokenizers import Tokenizer

from conftest import ROOT
from tristill.stages.data.chat import ChatTemplate, assistant_tokens, special_ids
from tristill.stages.data.config import DataConfig
from tristill.stages.data.corpus import documents
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.data.tokenized import load_corpus, split_windows
from tristill.stages.errors import CorpusError, TokenizerError
from tristill.stages.generate.text import generate_text
from tristill.stages.models.checkpoint import save_model
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.transformer import Transformer

pytest.importorskip("transformers", reason="the extra `hf` is not installed")


def counted_pieces(folder: Path, template: str, chat: Chat) -> tuple[list[str], int]:
    """(what the assistant says by the mask, one text per run of tokens that count; bytes of it)."""
    make_tokenizer(folder, template)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    document = ChatTemplate(folder).document(chat, "a test")
    encoding = tokenizer.encode(document.text, add_special_tokens=False)
    ids, mask, num_bytes = assistant_tokens(document, encoding, special_ids(tokenizer), 0)
    assert tokenizer.decode(ids, skip_special_tokens=False) == document.text + "<|endoftext|>"
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer.decode(ids[first:end], skip_special_tokens=False) for first, end in runs], num_bytes


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE])
def test_the_assistants_turns_count_with_the_token_that_ends_them_and_nothing_else(
    tmp_path: Path, template: str
) -> None:
    pieces, num_bytes = counted_pieces(tmp_path, template, HELLO)
    assert pieces == ["a caf\u00e9 \U0001f98a<|im_end|>", " river <|im_end|>"]
    assert num_bytes == len("a caf\u00e9 \U0001f98a river ".encode()), "special tokens are of no bytes"


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE])
def test_turns_of_weight_zero_are_not_taught(tmp_path: Path, template: str) -> None:
    chat = [HELLO[0], {**HELLO[1], "weight": 0}, HELLO[2], {**HELLO[3], "weight": 1}]
    assert counted_pieces(tmp_path, template, chat)[0] == [" river <|im_end|>"]


def test_without_a_special_token_the_end_of_the_text_ends_the_last_turn(tmp_path: Path) -> None:
    """A token that began before the turn, here with the space after the colon, is the assistant's too."""
    pieces, _ = counted_pieces(tmp_path, BARE_TEMPLATE, HELLO)
    assert pieces == [" a caf\u00e9 \U0001f98a\n", " river \n<|endoftext|>"]


def test_a_chat_without_the_assistant_has_no_token_that_counts(tmp_path: Path) -> None:
    assert counted_pieces(tmp_path, PLAIN_TEMPLATE, HELLO[:1]) == ([], 0)
    assert counted_pieces(tmp_path, MARKED_TEMPLATE, HELLO[:1]) == ([], 0)


def test_a_last_turn_that_is_rendered_otherwise_leaves_all_turns_known(tmp_path: Path) -> None:
    first, last = "a caf\u00e9 \U0001f98a<|im_end|>", " river <|im_end|>"
    bare = BARE_TEMPLATE.replace(
        "{{ message.content }}", "{{ '!' if message.role == 'assistant' and loop.last }}{{ message.content }}"
    )
    pieces, _ = counted_pieces(tmp_path / "bare", bare, HELLO)
    assert pieces[0] == " a caf\u00e9 \U0001f98a\n", "with what ends it, though no special token does"
    pieces, num_bytes = counted_pieces(tmp_path / "forgetful", FORGETFUL_TEMPLATE, HELLO)
    assert pieces == [first, f"<think>{last}"]
    assert num_bytes == len("a caf\u00e9 \U0001f98a<think> river ".encode())
    pieces, _ = counted_pieces(tmp_path / "reasoning", REASONING_TEMPLATE, HELLO)
    assert pieces == [first, f"<think>\n\n</think>\n\n{last}"]
    thoughts = [{**m, "content": f"<think>\nhm\n</think>\n\n{m['content']}"} for m in HELLO if m["role"] != "user"]
    chat = [HELLO[0], thoughts[0], HELLO[2], thoughts[1]]
    pieces, _ = counted_pieces(tmp_path / "reasoning", REASONING_TEMPLATE, chat)
    assert pieces == [first, f"<think>\nhm\n</think>\n\n{last}"]
    pieces, _ = counted_pieces(
        tmp_path / "reasoning", REASONING_TEMPLATE, [*HELLO, HELLO[0], {**HELLO[1], "content": ""}]
    )
    assert pieces == [first, last, "<think>\n\n</think>\n\n<|im_end|>"]
    # The generation prompt of templates for models that always reason: it opens what earlier turns do not have.
    opened = REASONING_TEMPLATE.replace("assistant\n' }}{%- endif %}\n", "assistant\n<think>\n' }}{%- endif %}\n")
    assert opened != REASONING_TEMPLATE
    pieces, _ = counted_pieces(tmp_path / "opened", opened, HELLO)
    assert pieces == [first, f"\n</think>\n\n{last}"]


def test_turns_of_a_tool_call_are_known_where_the_last_one_is_rendered_otherwise(tmp_path: Path) -> None:
    chat = [HELLO[0], HELLO[1], {"role": "tool", "content": "42"}, HELLO[3]]
    pieces, _ = counted_pieces(tmp_path, REASONING_TEMPLATE, chat)
    assert pieces == ["a caf\u00e9 \U0001f98a<|im_end|>", "<think>\n\n</think>\n\n river <|im_end|>"]


@pytest.mark.parametrize("name", sorted(UNKNOWN_TEMPLATES))
def test_a_template_that_does_not_show_a_turn_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    rendered = ChatTemplate(make_tokenizer(tmp_path / "tok", UNKNOWN_TEMPLATES[name]))
    with pytest.raises(CorpusError, match=r"rows\.jsonl, row 3: the chat template of .*tok does not render message 2 "):
        rendered.document(HELLO, "rows.jsonl, row 3")


def test_the_marks_that_the_docs_show_make_every_turn_known(tmp_path: Path) -> None:
    shown = (ROOT / "docs" / "methods.md").read_text().partition("```jinja\n")[2].partition("```")[0]
    others = "{%- else -%}{{- message.content + ('<|endoftext|>' if loop.last else '<|im_end|>\n') -}}{%- endif -%}"
    template = shown.replace("{%- endif -%}", others)
    assert template != shown
    pieces, _ = counted_pieces(tmp_path, f"{{% for message in messages %}}{template}{{% endfor %}}", HELLO)
    assert pieces == ["a caf\u00e9 \U0001f98a<|im_end|>", " river <|im_end|>"]


def test_what_a_template_refuses_is_said_with_the_roles(tmp_path: Path) -> None:
    template = ChatTemplate(make_tokenizer(tmp_path / "tok", "{{ raise_exception('no system here') }}"))
    with pytest.raises(CorpusError, match=r"refuses this chat of roles \['user', 'assistant'.*no system here"):
        template.document(HELLO, "x")
    template = ChatTemplate(make_tokenizer(tmp_path / "second", "{{ messages[2].role.lower() }}" + PLAIN_TEMPLATE))
    with pytest.raises(CorpusError, match=r"takes this chat of roles \['user', .*, but not its beginning up to mess"):
        template.document(HELLO, "x")


SYSTEM_TEMPLATE = "{% if messages[0].role != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}"
HOISTING_TEMPLATE = (
    "{% for message in messages if message.role == 'system' %}{{ message.content }}{% endfor %}"
    "{% for message in messages if message.role != 'system' %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "chat"),
    [
        (PLAIN_TEMPLATE, HELLO[1:]),
        (SYSTEM_TEMPLATE + PLAIN_TEMPLATE, HELLO[1:]),
        (HOISTING_TEMPLATE, [*HELLO[:3], {"role": "system", "content": "be kind"}, HELLO[3]]),
        (PLAIN_TEMPLATE.replace("assistant\n", "model\n"), HELLO),
        (PLAIN_TEMPLATE.replace("assistant\n", "what the model says\n"), HELLO),
    ],
    ids=[
        "begins",
        "begins after a system message of the template's",
        "a system message moves",
        "prompt",
        "long prompt",
    ],
)
def test_turns_are_known_whose_generation_prompt_is_not_what_stands_before_them(
    tmp_path: Path, template: str, chat: Chat
) -> None:
    pieces, _ = counted_pieces(tmp_path, template, chat)
    assert pieces == ["a caf\u00e9 \U0001f98a<|im_end|>", " river <|im_end|>"]


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE])
def test_a_template_that_asks_for_the_date_always_gets_the_same(tmp_path: Path, template: str) -> None:
    """Llama 3's form, and its fallback where no date is known; all else of the text stays."""
    asks = (
        "{%- if strftime_now is defined %}{%- set today = strftime_now('%d %b %Y, %-m/%-d, %A %H:%M') %}{%- endif %}\n"
        "{{- 'Today: ' + today + '\\n' }}"
    )
    folder = make_tokenizer(tmp_path / "tok", f"{asks}{template}")
    document = ChatTemplate(folder).document(HELLO, "x")
    today = "Today: 26 Jul 2024, 7/26, Friday 00:00\n"
    assert document.text.startswith(f"{today}<|im_start|>")
    plain = ChatTemplate(make_tokenizer(tmp_path / "plain", template)).document(HELLO, "x")
    assert document.text == today + plain.text
    assert document.assistant is not None
    assert plain.assistant is not None
    assert document.assistant == tuple((first + len(today), end + len(today)) for first, end in plain.assistant)
    folder = make_tokenizer(tmp_path / "spaced", f"\n  strftime_now\n{template}")
    assert ChatTemplate(folder).document(HELLO, "x").text == f"\n  strftime_now\n{plain.text}", "white space stays"


def write_rows(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    path = folder / f"rows.{kind.removesuffix('-file')}"
    if kind == "jsonl":
        return write_json_lines(path, rows)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=7)
        return path
    open_sink = pa.ipc.new_file if kind == "arrow-file" else pa.ipc.new_stream
    with path.open("wb") as file, open_sink(file, table.schema) as sink:
        sink.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "arrow-file"])
def test_records_of_every_kind_give_their_text_and_their_chats(tmp_path: Path, kind: str) -> None:
    chats = some_chats(30)
    rows = [{"messages": chat, "story": f"Story {n}." if n % 5 else None} for n, chat in enumerate(chats)]
    path = write_rows(tmp_path, kind, rows)
    source = {"kind": "records", "paths": [str(path)], "text_column": "story"}
    assert list(documents(DataConfig.model_validate({"source": source}).source)) == [  # type: ignore[arg-type]
        row["story"] for row in rows if row["story"]
    ]
    settings = chat_settings(path, make_tokenizer(tmp_path / "tokenizer"))
    described = tokenize_corpus(DataConfig.model_validate(settings), tmp_path / "data")
    assert sum(split.documents for split in described.splits.values()) == 30
    spoken = sum(
        len(message["content"].encode()) for chat in chats for message in chat if message["role"] == "assistant"
    )
    assert sum(split.text_bytes for split in described.splits.values()) == spoken


def test_a_hub_data_set_has_a_chat_column_too(tmp_path: Path) -> None:
    rows = [{"messages": chat} for chat in some_chats(30)]
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    path = write_json_lines(tmp_path / "rows.jsonl", rows)
    hub = {"kind": "hf", "path": "json", "arguments": {"data_files": str(path)}, "chat_column": "messages"}
    for name, source in (("hub", {"source": hub}), ("files", {})):
        tokenize_corpus(DataConfig.model_validate(chat_settings(path, tokenizer, **source)), tmp_path / name)
    for name in ("train.npy", "train-mask.npy", "validation.npy", "validation-mask.npy", "data.json"):
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()


def test_masks_of_windows_are_of_their_labels(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [{"messages": chat} for chat in some_chats(40)])
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    described = tokenize_corpus(DataConfig.model_validate(chat_settings(path, tokenizer)), tmp_path / "data")
    mask = np.load(tmp_path / "data" / "train-mask.npy")
    assert mask.sum() == described.splits["train"].counted.tokens  # type: ignore[union-attr]
    windows = split_windows(tmp_path / "data", "train")
    rows = list(range(windows.num_windows))
    found = windows.mask(rows)
    assert found is not None
    np.testing.assert_array_equal(found.ravel(), mask[1 : found.size + 1] != 0)
    np.testing.assert_array_equal(windows.counts(), found.sum(axis=1))
    end = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id("<|im_end|>")
    assert found[windows.read(rows)[:, 1:] == end].mean() < 0.7, "those that users write do not count"


def test_chats_without_the_assistant_are_left_out_with_their_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = some_chats(40)
    mute = [[*chat[:2], {"role": "user", "content": str(n)}] for n, chat in enumerate(some_chats(7, seed=1))]
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    for name, chats in (("kept", kept), ("both", [*mute[:4], *kept, *mute[4:]])):
        path = write_json_lines(tmp_path / f"{name}.jsonl", [{"messages": chat} for chat in chats])
        tokenize_corpus(DataConfig.model_validate(chat_settings(path, tokenizer)), tmp_path / name)
    assert "left out 7 chats in which the assistant says nothing" in capsys.readouterr().err
    for name in ("train.npy", "train-mask.npy", "data.json"):
        assert (tmp_path / "kept" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()


def test_a_limit_cuts_ids_and_mask_alike(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [{"messages": chat} for chat in some_chats(60)])
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    config = DataConfig.model_validate(chat_settings(path, tokenizer))
    tokenize_corpus(config, tmp_path / "whole")
    cut = tokenize_corpus(config.model_copy(update={"max_train_tokens": 1001}), tmp_path / "cut")
    for name in ("train.npy", "train-mask.npy"):
        np.testing.assert_array_equal(np.load(tmp_path / "cut" / name), np.load(tmp_path / "whole" / name)[:1001])
    assert cut.splits["train"].counted.tokens == np.load(tmp_path / "cut" / "train-mask.npy").sum()  # type: ignore[union-attr]


def test_the_mask_is_part_of_what_the_windows_are(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [{"messages": chat} for chat in some_chats(40)])
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    config = DataConfig.model_validate(chat_settings(path, tokenizer))
    corpus = tokenize_corpus(config, tmp_path / "data")
    other = corpus.model_copy(
        update={"splits": {name: split.model_copy(update={"counted": None}) for name, split in corpus.splits.items()}}
    )
    assert corpus.windows_fingerprint("train", 5) != other.windows_fingerprint("train", 5)
    assert corpus.fingerprint != other.fingerprint
    (tmp_path / "data" / "train-mask.npy").unlink()
    with pytest.raises(CorpusError, match=r"train-mask\.npy: cannot be read .* run `tristill tokenize` again"):
        split_windows(tmp_path / "data", "train")
    np.save(tmp_path / "data" / "train-mask.npy", np.ones(5, np.uint8))
    with pytest.raises(CorpusError, match=r"train-mask\.npy: found 5 tokens, expected \d+"):
        split_windows(tmp_path / "data", "train")
    half = (tmp_path / "data" / "data.json").read_text().replace('"counted"', '"counte"', 1)
    (tmp_path / "data" / "data.json").write_text(half)
    with pytest.raises(CorpusError, match=r"cannot be read as a tokenized corpus"):
        load_corpus(tmp_path / "data")


def test_a_split_in_which_the_assistant_says_nothing_is_refused(tmp_path: Path) -> None:
    """Its only label is the first token of the split, which no position predicts."""
    tokenizer = make_tokenizer(
        tmp_path / "tokenizer",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_start|>{% endfor %}",
    )
    config = DataConfig.model_validate(chat_settings(tmp_path / "rows.jsonl", tokenizer))
    chats = [[{"role": "user", "content": f"{n} " + "the fox " * 30}, HELLO[1]] for n in range(6)]
    for silent in (chats[0][:1], [chats[0][0], {"role": "assistant", "content": ""}]):
        write_json_lines(tmp_path / "rows.jsonl", [{"messages": silent}] * 3)
        with pytest.raises(
            CorpusError, match=r"\(records\) is empty: the assistant says nothing in any of its 3 chats"
        ):
            tokenize_corpus(config, tmp_path / "data")
    write_json_lines(tmp_path / "rows.jsonl", [{"messages": []}])
    with pytest.raises(CorpusError, match=r"the corpus \(records\) is empty: found no text in it"):
        tokenize_corpus(config, tmp_path / "data")
    write_json_lines(tmp_path / "rows.jsonl", [{"messages": chat} for chat in chats])
    tokens = config.model_copy(update={"max_train_tokens": 20, "max_validation_tokens": 20})
    with pytest.raises(CorpusError, match=r"the (train|validation) split"):
        tokenize_corpus(tokens, tmp_path / "data")
    assert not (tmp_path / "data" / "data.json").exists()


def test_a_split_in_which_the_assistant_only_ends_its_turns_is_refused(tmp_path: Path) -> None:
    """Its tokens count, but are of no bytes: there are no bits per byte."""
    chats = [[{"role": "user", "content": f"{n} the fox"}, {"role": "assistant", "content": ""}] for n in range(40)]
    path = write_json_lines(tmp_path / "rows.jsonl", [{"messages": chat} for chat in chats])
    settings = chat_settings(path, make_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(
        CorpusError, match=r"the train split: found no text in what the assistant says in its \d+ chats"
    ):
        tokenize_corpus(DataConfig.model_validate(settings), tmp_path / "data")
    assert not (tmp_path / "data" / "data.json").exists()


def test_truncation_and_padding_in_a_tokenizer_do_not_touch_the_corpus(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [{"messages": chat} for chat in some_chats(40)])
    plain = make_tokenizer(tmp_path / "plain")
    limited = make_tokenizer(tmp_path / "limited")
    tokenizer = Tokenizer.from_file(str(limited / "tokenizer.json"))
    tokenizer.enable_truncation(20)
    tokenizer.enable_padding(length=300)
    tokenizer.save(str(limited / "tokenizer.json"))
    for folder in (plain, limited):
        tokenize_corpus(DataConfig.model_validate(chat_settings(path, folder)), folder / "data")
        assert (folder / "data" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    for name in ("train.npy", "train-mask.npy", "validation.npy", "validation-mask.npy"):
        assert (plain / "data" / name).read_bytes() == (limited / "data" / name).read_bytes()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": "hello"}], r"row 1: found 'hello' in that column, expected a list of messages, each with role"),
        ([{"messages": [{"role": "user"}]}], r"row 1: found .* expected a list of messages"),
        ([{"chat": HELLO}], r"row 1: found no column 'messages', .* one of \['chat'\]; set data\.source\.chat_column"),
    ],
)
def test_rows_that_are_no_chats_are_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", rows)
    settings = chat_settings(path, make_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(CorpusError, match=message):
        tokenize_corpus(DataConfig.model_validate(settings), tmp_path / "data")


def test_a_chat_needs_a_template_and_says_so(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [{"messages": HELLO}])
    with pytest.raises(ValidationError, match=r"source\.chat_column: found 'messages' with tokenizer\.kind 'bpe'"):
        DataConfig.model_validate({**chat_settings(path, tmp_path), "tokenizer": {"kind": "bpe"}})
    source = {"kind": "records", "paths": ["x"], "chat_column": "messages", "text_column": "story"}
    with pytest.raises(ValidationError, match=r"found text_column 'story' and chat_column 'messages'; give one"):
        DataConfig.model_validate(chat_settings(path, tmp_path, source=source))
    folder = make_tokenizer(tmp_path / "tokenizer")
    file = DataConfig.model_validate(chat_settings(path, folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: found no folder; a chat template is read from"):
        tokenize_corpus(file, tmp_path / "data")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(TokenizerError, match=r"found no tokenizer with a chat template that transformers loads"):
        tokenize_corpus(DataConfig.model_validate(chat_settings(path, folder)), tmp_path / "data")


def test_records_are_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is not prepared in a folder of its own first: none is left in the cache of `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_json_lines(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
    source = DataConfig.model_validate({"source": {"kind": "records", "paths": [str(path)]}}).source
    assert list(documents(source)) == ["a", "b"]  # type: ignore[arg-type]
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_ends_of_turns_are_recorded_and_end_what_is_generated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [[*chat[:-1], {**chat[-1], "reasoning_content": "hm"}] for chat in some_chats(40)]
    path = write_json_lines(tmp_path / "rows.jsonl", [{"messages": chat} for chat in chats])
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    eos = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}  # the chats end otherwise
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(eos))
    described = tokenize_corpus(DataConfig.model_validate(chat_settings(path, tokenizer)), tmp_path / "data")
    assert (
        "leaves out what the chats hold, and no student is taught it: reasoning of 40 turns" in capsys.readouterr().err
    )
    end = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id("<|im_end|>")
    assert described.end_of_turn_ids == (end,)
    assert load_corpus(tmp_path / "data") == described
    assert described.model_copy(update={"end_of_turn_ids": ()}).fingerprint == described.fingerprint
    generation = json.loads((tmp_path / "data" / "generation_config.json").read_text())
    assert sorted(generation["eos_token_id"]) == [described.end_of_text_id, end]
    assert described.end_of_text_id == 0
    taught = [
        (np.load(tmp_path / "data" / f"{split}.npy") == end) & (np.load(tmp_path / "data" / f"{split}-mask.npy") == 1)
        for split in ("train", "validation")
    ]
    turns = sum(message["role"] == "assistant" for chat in chats for message in chat)
    assert sum(int(found.sum()) for found in taught) == turns
    model = Transformer(ModelConfig(width=32, layers=1, heads=2, mlp_width=32), described.vocab_size, None)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.fill_(1.0 if "norm" in name else 0.1 if "embed" in name else 0.0)
        model.head_weight[end] = 0.2  # so that it says nothing else
    save_model(tmp_path / "model", model, tmp_path / "data" / "tokenizer.json", 64, described.end_of_text_id)
    said: list[str] = []
    found = generate_text(
        tmp_path / "model", "the fox", temperature=0, top_p=1, seed=0, max_tokens=12, on_done=said.append
    )
    assert "".join(found) == "the fox"
    assert said[0].startswith("0 tokens after ")
