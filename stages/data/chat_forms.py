"""Forms of a chat that templates want, and a chat with marks in place of what a template should show."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from stages.data.conversation import Message

Tool = dict[str, Any]


def forms(messages: list[Message]) -> Iterator[list[Message]]:
    """One chat as templates want it: arguments of calls as objects or as JSON text, content as text or in parts."""
    yield messages
    if any("tool_calls" in message for message in messages):
        yield [_with_text_arguments(message) for message in messages]
    yield [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if message.get("content") else message
        for message in messages
    ]


def _with_text_arguments(message: Message) -> Message:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": text}}

    return {**message, "tool_calls": list(map(as_text, message["tool_calls"]))} if "tool_calls" in message else message


def prints_python(messages: Sequence[Message], text: str) -> bool:
    """Whether the text shows an object as Python prints it, which is no JSON."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    objects = [arguments for call in calls if isinstance(arguments := call["function"]["arguments"], dict)]
    objects += [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    return any(str(found) in text for found in objects if found)


def with_marks(
    messages: Sequence[Message], tools: Sequence[Tool], sign: str
) -> tuple[tuple[list[Message], list[Tool]], list[tuple[str, str, str]]]:
    """The chat and its tools with a mark in place of all that a template should show; kind, mark and text of each."""
    pieces: list[tuple[str, str, str]] = []

    def mark(kind: str, text: str) -> str:
        if not text.strip():
            return text
        pieces.append((kind, f"{sign}{len(pieces)}{sign}", text.strip()))
        return pieces[-1][1]

    def said(message: Message, content: str) -> str:
        before, tag, after = content.partition("</think>")
        if not tag or message["role"] != "assistant":
            return mark("content", content)
        opening, opened, thought = before.rpartition("<think>")
        return opening + opened + mark("reasoning", thought) + tag + mark("content", after)

    def marked(message: Message) -> Message:
        found, content = dict(message), message.get("content")
        if isinstance(content, str):
            found["content"] = said(message, content)
        elif content:
            found["content"] = [{**part, "text": said(message, part["text"])} for part in content]
        if name := next((key for key in ("reasoning_content", "thinking", "reasoning") if message.get(key)), None):
            found[name] = mark("reasoning", str(message[name]))
        if calls := message.get("tool_calls"):
            found["tool_calls"] = [
                {**call, "function": {**call["function"], "name": mark("tool calls", call["function"]["name"])}}
                for call in calls
            ]
        return found

    functions = [tool.get("function") for tool in tools]
    named = [
        {**tool, "function": {**function, "name": mark("tools", str(function.get("name", "")))}}
        if isinstance(function, dict)
        else tool
        for tool, function in zip(tools, functions, strict=True)
    ]
    return ([marked(message) for message in messages], named), pieces
