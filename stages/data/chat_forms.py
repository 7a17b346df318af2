"""Forms of a chat that templates want, and a chat with marks in place of what a template should show."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tristill.stages.data.conversation import Message

Tool = dict[str, Any]


def forms(messages: list[Message]) -> Iterator[list[Message]]:
    """One chat as templates want it: arguments of calls as objects or as JSON text, content as text or in parts.

    Then each of these with empty text in place of content that is null.
    """
    found = [messages]
    if any("tool_calls" in message for message in messages):
        found.append([_with_text_arguments(message) for message in messages])
    found.append(
        [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if message.get("content")
            else message
            for message in messages
        ]
    )
    yield from found
    if _has_null_content(messages):
        yield from ([{**message, "content": message.get("content") or ""} for message in form] for form in found)


def _has_null_content(messages: Sequence[Message]) -> bool:
    return any(message.get("content", "") is None for message in messages)


def _with_text_arguments(message: Message) -> Message:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": text}}

    return {**message, "tool_calls": list(map(as_text, message["tool_calls"]))} if "tool_calls" in message else message


def prints_python(messages: Sequence[Message], text: str) -> int:
    """How often the text shows an object, or null in place of a content, as Python prints it, which is no JSON."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    objects = [arguments for call in calls if isinstance(arguments := call["function"]["arguments"], dict)]
    objects += [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    nulls = text.count("None") if _has_null_content(messages) else 0
    return any(str(found) in text for found in objects if found) + nulls


class Piece(NamedTuple):
    """What a template should show: whose it is (a message's number, None for the tools), its mark and its text."""

    turn: int | None
    kind: str
    mark: str
    text: str


def with_marks(
    messages: Sequence[Message], tools: Sequence[Tool], sign: str
) -> tuple[list[Message], list[Tool], list[Piece]]:
    """The chat and its tools with a mark in place of all that a template should show; and what these marks are for."""
    pieces: list[Piece] = []

    def mark(turn: int | None, kind: str, text: str) -> str:
        if not text.strip():
            return text
        pieces.append(Piece(turn, kind, f"{sign}{len(pieces)}{sign}", text.strip()))
        return pieces[-1].mark

    def said(turn: int, content: str) -> str:
        before, tag, after = content.partition("</think>")
        if not tag or messages[turn]["role"] != "assistant":
            return mark(turn, "content", content)
        opening, opened, thought = before.rpartition("<think>")
        return opening + opened + mark(turn, "reasoning", thought) + tag + mark(turn, "content", after)

    def named(turn: int | None, kind: str, holder: dict[str, Any]) -> dict[str, Any]:
        function = holder.get("function")
        if not isinstance(function, dict):
            return holder
        return {**holder, "function": {**function, "name": mark(turn, kind, str(function.get("name", "")))}}

    def marked(turn: int, message: Message) -> Message:
        found, content = dict(message), message.get("content")
        if isinstance(content, str):
            found["content"] = said(turn, content)
        elif content:
            found["content"] = [{**part, "text": said(turn, part["text"])} for part in content]
        if name := next((key for key in ("reasoning_content", "thinking", "reasoning") if message.get(key)), None):
            found[name] = mark(turn, "reasoning", str(message[name]))
        if calls := message.get("tool_calls"):
            found["tool_calls"] = [named(turn, "tool calls", call) for call in calls]
        return found

    chat = [marked(turn, message) for turn, message in enumerate(messages)]
    return chat, [named(None, "tools", tool) for tool in tools], pieces
