"""Chats as data sets hold them, brought to one form: messages of {role, content, tool_calls ..} and tools.

Formats: messages (role, content), ShareGPT (from, value), texts in turn, and a prompt with its answer in two columns.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tristill.stages.errors import CorpusError

Message = dict[str, Any]
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text")
_ROLES = {
    **dict.fromkeys(["human", "user", "prompter"], "user"),
    **dict.fromkeys(["gpt", "assistant", "chatgpt", "bard", "bing", "model"], "assistant"),
    **dict.fromkeys(["tool", "observation", "function_response", "function"], "tool"),
    "function_call": "function_call",
    "system": "system",
}
_PROMPTS = ("prompt", "instruction", "question", "query")
_ANSWERS = ("completion", "output", "response", "answer", "chosen")
_FURTHER = ("input", "context")
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
BESIDE = ("messages", "conversations", *_PROMPTS, *_ANSWERS, *_FURTHER, *_SYSTEM, "history", *_TOOLS)
"""Columns that may belong to a chat, beside the one that is named."""
_EXPECTED = (
    "expected a list of messages, each with role and content (or from and value, as ShareGPT has them), or the text of "
    f"a prompt with its answer in another column ({', '.join(_ANSWERS)})"
)


class _NoChatError(Exception):
    """Found and expected; the place is added by whoever knows it."""


@dataclass(frozen=True)
class Conversation:
    """One chat. Arguments of tool calls are objects where they are JSON, content is text or None."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


def conversation(row: Mapping[str, Any], column: str, where: str, *, is_aligned: bool) -> Conversation | None:
    """The chat in a row; None if that column holds none.

    is_aligned: whether the row is from a table, which fills what a row lacks with nulls; these are dropped.
    Raises CorpusError, naming the place and the format found, for anything that is no chat of text.
    """
    given = {
        name: _plain(row[name], f"{where}: column {name!r}", is_aligned) for name in row if name in (column, *BESIDE)
    }
    value = given.get(column)
    if value is None and column in row:
        return None
    read = _format_of(value) if value is not None else None
    if read is None:
        raise CorpusError(f"{where}: {_unknown(value, row, column)}")
    try:
        messages = list(read(value, given, column))
        system = next((given[name] for name in _SYSTEM if given.get(name)), None)
        if isinstance(system, str) and system and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        return Conversation(tuple(messages), _tools(given))
    except _NoChatError as exc:
        raise CorpusError(f"{where}: {exc}") from exc


def _format_of(value: Any) -> Callable[[Any, Mapping[str, Any], str], Iterator[Message]] | None:
    """The reader of a format, told by what is there; None if it is none that is known."""
    listed = _listed(value)
    if listed is None:
        is_text = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
        return _texts_in_turn if is_text else _prompt_and_completion if isinstance(value, str) else None
    said = {*_CONTENT_KEYS, "tool_calls", "function_call", "reasoning_content"}
    is_known = all(found.keys() & {*_ROLE_KEYS} and found.keys() & said for found in listed)
    return _messages if is_known else None


def _listed(value: Any) -> list[Message] | None:
    """A list of objects, also one that is stored as JSON text, or as one list for every key; None if it is none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json_of(value)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        return None
    found = [_json_of(message) if isinstance(message, str) else message for message in value]
    return found if all(isinstance(message, dict) for message in found) else None


def _messages(value: Any, row: Mapping[str, Any], column: str) -> Iterator[Message]:
    """OpenAI's form, or ShareGPT's. A conversation in `prompt` goes on in `completion`, whichever of them is named."""
    listed = _listed(value) or []
    if column in _PROMPTS and (answer := next((row[name] for name in _ANSWERS if row.get(name)), None)):
        after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else _listed(answer)
        if not after:
            raise _NoChatError(f"found messages in column {column!r}, but {str(answer)[:60]!r} for what follows them")
        listed = [*listed, *after]
    elif column in _ANSWERS:
        before = next((row[name] for name in _PROMPTS if isinstance(row.get(name), list)), None)
        listed = [*(_listed(before) or []), *listed]
    for number, message in enumerate(listed, start=1):
        key = next(key for key in _ROLE_KEYS if key in message)
        given = message[key]
        if not isinstance(given, str):
            raise _NoChatError(f"message {number}: found {key} {given!r}, {_EXPECTED}")
        role = _ROLES.get(given.lower(), given if key == "role" else None)
        if role is None:
            raise _NoChatError(
                f"message {number}: found from {given!r} in a chat of ShareGPT's format, expected one of "
                f"{sorted(_ROLES)}"
            )
        said = next((name for name in _CONTENT_KEYS if name in message), None)
        content = None if said is None else message[said]
        rest = {name: found for name, found in message.items() if name not in (key, said)}
        if role == "function_call":
            yield _message({**rest, "role": "assistant", "tool_calls": _calls_in(content, number)}, number)
        else:
            yield _message({**rest, "role": role, "content": content}, number)


def _texts_in_turn(value: Any, row: Mapping[str, Any], column: str) -> Iterator[Message]:  # noqa: ARG001 - as its siblings
    """A list of texts, as UltraChat has them: the first is the user's."""
    for number, text in enumerate(value):
        yield {"role": "assistant" if number % 2 else "user", "content": text}


def _prompt_and_completion(value: Any, row: Mapping[str, Any], column: str) -> Iterator[Message]:
    """Two texts, the first with what is in a column `input`, after what `history` says."""
    name = next((name for name in _ANSWERS if name in row and name != column), None)
    if name is None:
        raise _NoChatError(_unknown(value, row, column))
    answer = row[name]
    if not isinstance(answer, str):
        raise _NoChatError(
            f"found text in column {column!r}, but {str(answer)[:60]!r} in {name!r}; expected its answer as text"
        )
    for turn in row.get("history") or ():
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise _NoChatError(
                f"column 'history': found {str(turn)[:60]!r}, expected a list of pairs of prompt and answer"
            )
        yield {"role": "user", "content": turn[0]}
        yield {"role": "assistant", "content": turn[1]}
    further = next((row[name] for name in _FURTHER if row.get(name) and name != column), None)
    yield {"role": "user", "content": f"{value}\n{further}" if further else value}
    yield {"role": "assistant", "content": answer}


def _message(message: Message, number: int) -> Message:
    """One message: nulls are left out but for a content that is null, as a turn that calls tools has it."""
    kept = {key: value for key, value in message.items() if value is not None}
    role, content = kept.pop("role"), _content(kept.pop("content", None), number)
    calls = kept.pop("tool_calls", None)
    if "function_call" in kept and not calls:
        calls = [kept.pop("function_call")]
    found: Message = {"role": role, "content": content, **kept}
    if calls:
        found["tool_calls"] = [_call(call, number) for call in _list_of_objects(calls, "tool_calls", number)]
    return found


def _content(content: Any, number: int) -> str | None:
    """The text of a message; of parts, all of them joined."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _NoChatError(
            f"message {number}: found content {str(content)[:60]!r}, expected text or a list of its parts"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
            raise _NoChatError(
                f"message {number}: found a part of type {kind!r} in its content, expected text alone; leave it out"
            )
        texts.append(text)
    return "".join(texts)


def _call(call: Message, number: int) -> Message:
    """A tool call as OpenAI writes it, its arguments as an object where they are one."""
    given = call.get("function", call)
    if not (isinstance(given, dict) and isinstance(given.get("name"), str)):
        raise _NoChatError(
            f"message {number}: found the tool call {str(call)[:80]!r}, expected one with a function's name"
        )
    arguments = given.get("arguments", given.get("parameters", {}))
    parsed = _json_of(arguments) if isinstance(arguments, str) else arguments
    rest = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
    function = {
        **{key: value for key, value in given.items() if value is not None and key not in ("arguments", "parameters")},
        "arguments": parsed if isinstance(parsed, dict) else arguments,
    }
    return {"type": "function", **rest, "function": function}


def _calls_in(value: Any, number: int) -> list[Message]:
    """The calls that ShareGPT's format holds as JSON text."""
    found = _json_of(value) if isinstance(value, str) else value
    return _list_of_objects([found] if isinstance(found, dict) else found, "function_call", number)


def _list_of_objects(value: Any, what: str, number: int) -> list[Message]:
    listed = _listed(value)
    if listed is None:
        raise _NoChatError(
            f"message {number}: found {str(value)[:80]!r} for {what}, expected JSON objects, each with a name"
        )
    return listed


def _tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """What the assistant may call, as OpenAI writes it."""
    name = next((name for name in _TOOLS if row.get(name)), None)
    if name is None:
        return ()
    listed = _listed(row[name])
    if listed is None:
        raise _NoChatError(f"column {name!r}: found {str(row[name])[:80]!r}, expected a list of tools, each an object")
    return tuple(
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in listed
    )


def _plain(value: Any, where: str, drops_nulls: bool, depth: int = 0) -> Any:
    """What JSON can hold; of objects without their nulls, where a table may have put these.

    A message's own `content` (a list's objects are at depth 1) may be null.
    """
    if isinstance(value, dict):
        return {
            key: _plain(found, where, drops_nulls, depth + 1)
            for key, found in value.items()
            if not drops_nulls or found is not None or (key == "content" and depth == 1)
        }
    if isinstance(value, list | tuple):
        return [_plain(found, where, drops_nulls, depth + 1) for found in value]
    if value is not None and not isinstance(value, str | int | float | bool):
        raise CorpusError(
            f"{where}: found a {type(value).__name__} ({str(value)[:40]}), which may have been other text in the data; "
            "expected text, numbers, lists and objects: store it as text, or read JSON lines with kind = 'records'"
        )
    return value


def _json_of(text: str) -> Any:
    """The value that a text holds as JSON; the text itself if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _unknown(value: Any, row: Mapping[str, Any], column: str) -> str:
    """What was found in place of a chat in that column, or in those beside it if there is none."""
    advice = f"{_EXPECTED}, in one of {sorted(row)}; set data.source.chat_column"
    if value is not None:
        listed = _listed(value)
        found = f"messages of keys {sorted(listed[0])}" if listed else repr(str(value)[:80])
        return f"found {found} in that column, {advice}"
    for name in ("messages", "conversations", *_PROMPTS):
        read = _format_of(row[name]) if row.get(name) is not None else None
        if read is not None:
            found = f"{'prompts' if read is _prompt_and_completion else 'chats'} in {name!r}"
            return f"found no column {column!r}, but {found}; set data.source.chat_column = {name!r}"
    return f"found no column {column!r}, {advice}"
