"""Chats in the formats that data sets have: the same chat gives the same text from all of them."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import PLAIN_TEMPLATE, TOOL_TEMPLATE, make_tokenizer, write_json_lines

from tristill.stages.data.chat import ChatTemplate, Document
from tristill.stages.data.config import HuggingFaceDataset, RecordFiles
from tristill.stages.data.conversation import conversation
from tristill.stages.data.corpus import chats
from tristill.stages.errors import CorpusError

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

Row = dict[str, Any]
CHAT: Row = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the fox?"},
        {"role": "assistant", "content": "a river"},
    ]
}
SHAREGPT = [{"from": "human", "value": "the fox?"}, {"from": "gpt", "value": "a river"}]
SAME_CHATS: dict[str, tuple[str, Row]] = {
    "ShareGPT": ("conversations", {"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT]}),
    "ShareGPT's words under OpenAI's keys": (
        "conversations",
        {
            "conversations": [{"role": of["from"].title(), "text": of["value"]} for of in SHAREGPT],
            "system": "Be brief.",
        },
    ),
    "an answer that is named": ("chosen", {"prompt": CHAT["messages"][:2], "chosen": CHAT["messages"][2:]}),
    "texts in turn": ("data", {"data": ["the fox?", "a river"], "system_prompt": "Be brief."}),
    "instruction with context": (
        "instruction",
        {"instruction": "the", "context": "fox?", "response": "a river", "system": "Be brief.", "category": "qa"},
    ),
    "ShareGPT with a column for the system": ("conversations", {"conversations": SHAREGPT, "system": "Be brief."}),
    "prompt and completion": ("prompt", {"prompt": "the fox?", "completion": "a river", "system": "Be brief."}),
    "instruction": ("instruction", {"instruction": "the", "input": "fox?", "output": "a river", "system": "Be brief."}),
    "prompt and completion of messages": (
        "prompt",
        {"prompt": CHAT["messages"][:2], "completion": CHAT["messages"][2:]},
    ),
    "parts": (
        "messages",
        {
            "messages": [
                {
                    **message,
                    "content": [
                        {"type": "text", "text": word} for word in (message["content"][:3], message["content"][3:])
                    ],
                }
                for message in CHAT["messages"]
            ]
        },
    ),
    "JSON in a column of text": ("messages", {"messages": json.dumps(CHAT["messages"])}),
    "a list for every key": (
        "messages",
        {"messages": {key: [message[key] for message in CHAT["messages"]] for key in ("role", "content")}},
    ),
}


def call(name: str, arguments: Any, content: str | None = None) -> Row:
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def calling(*turns: Row) -> Row:
    return {"messages": [{"role": "user", "content": "please"}, *turns]}


def rendered(template: ChatTemplate, row: Row, column: str = "messages", *, is_aligned: bool = False) -> Document:
    found = conversation(row, column, "rows.jsonl, row 7", is_aligned=is_aligned)
    assert found is not None
    return template.document(found.messages, "rows.jsonl, row 7", found.tools)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return ChatTemplate(make_tokenizer(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return ChatTemplate(make_tokenizer(tmp_path_factory.mktemp("tools"), TOOL_TEMPLATE))


@pytest.mark.parametrize("name", sorted(SAME_CHATS))
def test_every_format_gives_the_text_of_messages(plain: ChatTemplate, name: str) -> None:
    column, row = SAME_CHATS[name]
    expected = rendered(plain, CHAT)
    if name.startswith("instruction"):
        expected = Document(expected.text.replace("the fox", "the\nfox"), expected.assistant, expected.ends)
    assert rendered(plain, row, column) == expected
    assert expected.left_out == ()


def test_what_came_before_in_a_column_history_is_part_of_the_chat(plain: ChatTemplate) -> None:
    row = {"instruction": "and?", "input": "", "output": "no", "history": [["the fox?", "a river"]]}
    turns = [("user", "the fox?"), ("assistant", "a river"), ("user", "and?"), ("assistant", "no")]
    expected = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert rendered(plain, row, "instruction") == rendered(plain, expected)


def test_tool_calls_of_every_form_give_the_same_text(tooled: ChatTemplate) -> None:
    tool = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
    answer, end = {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "It is sunny."}
    expected = rendered(
        tooled,
        {
            **calling(call("weather", {"city": "R\u00f4me"}), answer, end),
            "tools": [{"type": "function", "function": tool}],
        },
    )
    assert '"description": "of a city"' in expected.text
    assert expected.assistant is not None
    said = [expected.text[first:end] for first, end in expected.assistant]
    assert said == [
        '<tool_call>{"name": "weather", "arguments": {"city": "R\u00f4me"}}</tool_call><|im_end|>',
        "It is sunny.<|im_end|>",
    ]
    text = '{"city":"R\\u00f4me"}'
    rest = (answer, end)
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": text}}
    others: list[tuple[str, Row]] = [
        ("messages", {**calling(call("weather", text), *rest), "tools": json.dumps([tool])}),
        (
            "messages",
            {
                **calling({"role": "assistant", "tool_calls": call("weather", text)["tool_calls"]}, *rest),
                "tools": [tool],
            },
        ),
        (
            "messages",
            {**calling(legacy, {"role": "function", "name": "weather", "content": "sun"}, end), "functions": [tool]},
        ),
        (
            "conversations",
            {
                "conversations": [
                    {"from": "human", "value": "please"},
                    {
                        "from": "function_call",
                        "value": json.dumps({"name": "weather", "arguments": {"city": "R\u00f4me"}}),
                    },
                    {"from": "observation", "value": "sun"},
                    {"from": "gpt", "value": "It is sunny."},
                ],
                "tools": json.dumps([tool]),
            },
        ),
    ]
    for column, row in others:
        assert rendered(tooled, row, column) == expected


def test_arguments_are_given_as_the_template_takes_them(tmp_path: Path) -> None:
    """As objects, or as text where the template adds them to text, or prints an object as Python does."""
    for number, sign in enumerate(["arguments | tojson", "'' + c.function.arguments", "c.function.arguments"]):
        shown = sign.replace("arguments | tojson", "c.function.arguments | tojson")
        template = PLAIN_TEMPLATE.replace(
            "{{ message.content }}",
            f"{{{{ message.content or '' }}}}{{% for c in message.tool_calls or [] %}}{{{{ c.function.name }}}}{{{{ {shown} }}}}{{% endfor %}}",
        )
        for arguments in ({"a": [1, None]}, '{"a":[1,null]}'):
            found = rendered(
                ChatTemplate(make_tokenizer(tmp_path / str(number), template)), calling(call("f", arguments))
            )
            assert 'assistant\nf{"a": [1, null]}<|im_end|>' in found.text


def write_table(path: Path, rows: list[Row], schema: pa.Schema | None = None) -> Path:
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.Table.from_pylist([{**dict.fromkeys(names), **row} for row in rows], schema=schema)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as sink:
            sink.write_table(table)
    return path


def test_nulls_that_tables_put_into_structs_never_reach_the_text(tmp_path: Path, tooled: ChatTemplate) -> None:
    tools = [
        {"type": "function", "function": {"name": "mail", "parameters": {"properties": {"to": {"type": "string"}}}}}
    ]
    rows: list[Row] = [
        calling(call("weather", {"city": "Rome"})),
        {**calling(call("mail", {"to": "a", "more": [{"x": {"deep": 1}}, {"y": "b"}]})), "tools": tools},
        calling({"role": "assistant", "content": "hello"}),
        calling({**call("now", {}), "reasoning_content": "hm"}),
        calling(call("write", {"to": "b", "content": "text"})),
        {
            **calling(call("weather", {"city": "Oslo"})),
            "tools": [{"type": "function", "function": {"name": "weather"}}],
        },
    ]
    lines = write_json_lines(tmp_path / "rows.jsonl", rows)
    sources: list[RecordFiles | HuggingFaceDataset] = [
        RecordFiles(kind="records", paths=(str(path),), chat_column="messages")
        for path in (lines, *(write_table(tmp_path / f"rows.{kind}", rows) for kind in ("parquet", "arrow")))
    ]
    for builder, file in (("json", lines), ("parquet", tmp_path / "rows.parquet")):
        sources.append(
            HuggingFaceDataset(kind="hf", path=builder, arguments={"data_files": str(file)}, chat_column="messages")
        )
    expected, *others = [list(chats(source, tooled)) for source in sources]
    assert len(expected) == len(rows)
    assert not any("null" in chat.text.lower() or "None" in chat.text for chat in expected)
    assert '{"name": "now", "arguments": {}}' in expected[3].text
    for found in others:
        assert found == expected


def test_a_map_of_arguments_is_an_object(tmp_path: Path, tooled: ChatTemplate) -> None:
    function = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    message = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(pa.struct([("function", function)])))]
    )
    row = calling(call("mail", {"to": "a"}))
    del row["messages"][1]["tool_calls"][0]["type"]
    path = write_table(tmp_path / "rows.parquet", [row], pa.schema([("messages", pa.list_(message))]))
    (found,) = chats(RecordFiles(kind="records", paths=(str(path),), chat_column="messages"), tooled)
    assert found == rendered(tooled, calling(call("mail", {"to": "a"})))


def test_a_null_that_json_lines_do_have_stays(tooled: ChatTemplate) -> None:
    row = calling(call("mail", {"to": None}))
    assert '{"to": null}' in rendered(tooled, row).text
    assert '"arguments": {}' in rendered(tooled, row, is_aligned=True).text


def test_a_null_content_goes_to_the_template_as_it_is_and_is_never_printed(tmp_path: Path) -> None:
    row = calling(call("f", {}, None))
    asks = PLAIN_TEMPLATE.replace(
        "{{ message.content }}", "{{ 'calls' if message.content is none else message.content }}"
    )
    assert "assistant\ncalls<|im_end|>" in rendered(ChatTemplate(make_tokenizer(tmp_path / "asks", asks)), row).text
    prints = ChatTemplate(make_tokenizer(tmp_path / "prints"))
    assert rendered(prints, row).text.endswith("assistant\n<|im_end|>\n")
    strict = ChatTemplate(
        make_tokenizer(tmp_path / "strict", PLAIN_TEMPLATE.replace("message.content", "'' + message.content"))
    )
    found = rendered(strict, row)
    assert found.text.endswith("assistant\n<|im_end|>\n")
    assert found.left_out == ("tool calls",)


def test_content_is_given_in_parts_to_a_template_that_takes_nothing_else(tmp_path: Path, plain: ChatTemplate) -> None:
    parts = PLAIN_TEMPLATE.replace(
        "{{ message.content }}",
        "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
    )
    found = rendered(ChatTemplate(make_tokenizer(tmp_path / "parts", parts)), CHAT)
    assert found == rendered(plain, CHAT)


@pytest.mark.parametrize(
    ("column", "row", "message"),
    [
        ("messages", {"messages": [{"speaker": "A", "says": "hi"}]}, r"found messages of keys \['says', 'speaker'\] in that column"),
        ("messages", {"conversations": SHAREGPT}, r"no column 'messages', but chats in 'conversations'; set data.source.chat_column = 'conversations'"),
        ("messages", {"prompt": "a", "completion": "b"}, r"no column 'messages', but prompts in 'prompt'; set data.source.chat_column = 'prompt'"),
        ("prompt", {"prompt": "a"}, r"found 'a' in that column, expected .* in another column \(completion, "),
        ("prompt", {"prompt": "a", "completion": 5}, r"found text in column 'prompt', but '5' in 'completion'"),
        ("conversations", {"conversations": [{"from": "narrator", "value": "x"}]}, r"message 1: found from 'narrator' .* ShareGPT's"),
        ("conversations", {"conversations": [{"from": "function_call", "value": "x"}]}, r"message 1: found 'x' for function_call"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            r"message 1: found a part of type 'image_url' in its content, expected text alone",
        ),
        ("messages", {"messages": [{"role": "user", "content": 5}]}, r"message 1: found content '5', expected text"),
        ("messages", {"messages": [{"role": 5, "content": "x"}]}, r"message 1: found role 5"),
        ("messages", calling({"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}), r"message 2: found the tool call "),
        ("messages", {**CHAT, "tools": "none"}, r"column 'tools': found 'none', expected a list of tools"),
        ("messages", calling(call("book", {"day": datetime(2024, 5, 1, tzinfo=UTC)})), r"column 'messages': found a datetime \(2024-05-01"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused_with_its_place_and_format(
    plain: ChatTemplate, column: str, row: Row, message: str
) -> None:
    with pytest.raises(CorpusError, match=rf"^rows\.jsonl, row 7: .*{message}"):
        rendered(plain, row, column)


def test_the_place_of_a_refusal_is_the_line_of_its_own_file(tmp_path: Path, plain: ChatTemplate) -> None:
    write_json_lines(tmp_path / "a.jsonl", [CHAT] * 3)
    (tmp_path / "b.jsonl").write_text(json.dumps(CHAT) + '\n\n\n{"messages": "hello"}\n')
    with pytest.raises(CorpusError, match=r"b\.jsonl, row 4: found 'hello' in that column"):
        list(chats(RecordFiles(kind="records", paths=(str(tmp_path),), chat_column="messages"), plain))


def test_dates_in_json_lines_are_text_and_refused_where_a_loader_made_dates_of_them(
    tmp_path: Path, tooled: ChatTemplate
) -> None:
    path = write_json_lines(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "2024-05-01"}]}])
    (found,) = chats(RecordFiles(kind="records", paths=(str(path),), chat_column="messages"), tooled)
    assert "user\n2024-05-01<|im_end|>" in found.text
    hub = HuggingFaceDataset(kind="hf", path="json", arguments={"data_files": str(path)}, chat_column="messages")
    with pytest.raises(
        CorpusError, match=r"row 1: column 'messages': found a datetime .* read JSON lines with kind = 'records'"
    ):
        list(chats(hub, tooled))


def test_what_a_template_does_not_show_is_counted_by_kind(
    tmp_path: Path, plain: ChatTemplate, tooled: ChatTemplate
) -> None:
    thinks = {"role": "assistant", "content": "<think>two and two</think>4"}
    field = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    assert rendered(plain, calling(thinks)).left_out == ()
    assert rendered(plain, calling(field)).left_out == ("reasoning",)
    drops = PLAIN_TEMPLATE.replace("message.content }}", "message.content.split('</think>')[-1] }}")
    dropping = ChatTemplate(make_tokenizer(tmp_path / "drops", drops))
    assert rendered(dropping, calling(thinks, *calling(thinks)["messages"])).left_out == ("reasoning", "reasoning")
    assert rendered(dropping, calling(thinks)).text.endswith("assistant\n4<|im_end|>\n")
    both = call("f", {}, "text")
    row = {**calling({**both, "tool_calls": both["tool_calls"] * 2}), "tools": [{"name": "f"}, {"name": "g"}]}
    assert sorted(rendered(plain, row).left_out) == ["tool calls", "tools"]
    assert rendered(tooled, row).left_out == ()


datasets.disable_progress_bars()
