"""Chats as text, by the chat template of a Hugging Face folder, and which of their tokens are the assistant's.

transformers renders them (extra `hf`); the tokens are those of the run's own tokenizer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from tristill.cache.regular_file import require_regular_files
from tristill.stages.data.chat_forms import Tool, forms, prints_python, with_marks
from tristill.stages.data.conversation import Message
from tristill.stages.errors import CorpusError, TokenizerError

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_OPEN_REASONING = re.compile(r"<think>\s*$")
"""What the generation prompt of a model that always reasons ends with, and a turn without reasoning does not have."""
_MARKS = range(0xE000, 0xF900)  # Unicode's area for private use
TODAY = date(2024, 7, 26)
"""What `strftime_now` of a template says today is, so that tokens do not change overnight: a date of Llama 3's."""
_DIRECTIVES = [*"aAbBcdDeFGhHIjmMpSTuUVwWxXyY", *(f"-{of}" for of in "dHIjmMSy"), "%"]


@dataclass(frozen=True)
class Document:
    """Text of the corpus. assistant: of a chat, where the assistant speaks, (first, end) characters; None if plain.

    ends: tokens in the text that end these turns. left_out: kinds of what the template does not show, one per turn.
    """

    text: str
    assistant: tuple[Span, ...] | None = None
    ends: tuple[Span, ...] = ()
    left_out: tuple[str, ...] = ()


class _Rendered(NamedTuple):
    """A chat as a template shows it. spans: of its generation marks."""

    messages: list[Message]
    text: str
    spans: list[Span]
    left_out: tuple[str, ...]

    @property
    def faults(self) -> int:
        """How much of it another form may show better."""
        return sum(kind in ("content", "tool calls") for kind in self.left_out) + prints_python(
            self.messages, self.text
        )


class ChatTemplate:
    """The chat template of a folder.

    What is the assistant's is what stands between its `{% generation %}` marks; without marks, what a turn of the
    assistant adds to the chat before it with the generation prompt; and the token that ends the turn. Today is always
    TODAY.
    """

    def __init__(self, folder: Path) -> None:
        """Raises TokenizerError if there is no folder with a tokenizer of transformers and a chat template."""
        if not folder.is_dir():
            raise TokenizerError(
                f"{folder}: found no folder; a chat template is read from a Hugging Face folder with tokenizer.json, "
                "tokenizer_config.json and chat_template.jinja: set data.tokenizer.path to one"
            )
        try:
            import transformers
            from transformers.utils.chat_template_utils import render_jinja_template
        except ImportError as exc:
            raise TokenizerError(
                f"{folder}: its chat template needs transformers, which is not installed; run `pip install -e '.[hf]'`"
            ) from exc
        try:
            require_regular_files(folder)
            arguments = {"local_files_only": True, "trust_remote_code": False}
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), **arguments)
            source: str = self._tokenizer.get_chat_template()
        except Exception as exc:  # the library raises many kinds
            first_line = (str(exc).splitlines() or [""])[0]
            raise TokenizerError(
                f"{folder}: found no tokenizer with a chat template that transformers loads ({type(exc).__name__}: "
                f"{first_line}); put a chat_template.jinja there, or read a text column"
            ) from exc
        self._folder = folder
        self._render: Any = render_jinja_template
        self._is_marked = _GENERATION.search(source) is not None
        source = _with_own_marks(source) if self._is_marked else source
        self._source = _with_fixed_date(source) if "strftime_now" in source else source
        self._opening, self._endings = self._turn_tokens()

    def _turn_tokens(self) -> tuple[str, tuple[str, ...]]:
        """The generation prompt; and the tokens that may end a turn, the longest first.

        Those are the special ones, and others that the template puts after what the assistant says or calls.
        """
        user, mark = {"role": "user", "content": "?"}, chr(_MARKS[-1])
        call = {"type": "function", "function": {"name": mark, "arguments": {}}}
        answers = ({"content": mark}, {"content": None, "tool_calls": [call]})
        chats = [form for answer in answers for form in forms([user, {"role": "assistant", **answer}])]
        endings = [self._shown(chat).rpartition(mark)[2] for chat in chats]
        prompt = self._shown([user], prompts=True).removeprefix(self._shown([user]))
        added = [token for token in self._tokenizer.added_tokens_decoder.values() if token.content.strip()]
        known = {token.content for token in added if token.special or any(token.content in text for text in endings)}
        return prompt, tuple(sorted(known, key=len, reverse=True))

    def document(self, messages: Sequence[Message], where: str, tools: Sequence[Tool] = ()) -> Document:
        """A chat as one document. Raises CorpusError, naming `where`, if the template does not take it."""
        try:
            chat = self._taken(list(messages), tools)
        except Exception as exc:  # whatever a template raises
            raise CorpusError(
                f"{where}: the chat template of {self._folder} refuses this chat of roles {_roles(messages)} ({exc}); "
                "correct the chat, or leave it out"
            ) from exc
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        taught = [turn for turn in turns if messages[turn].get("weight") != 0]
        spans = chat.spans
        if not self._is_marked:
            spans = [self._span_of_turn(chat.messages, tools, turn, chat.text, where) for turn in taught]
        elif taught != turns:
            if len(spans) != len(turns):
                raise CorpusError(
                    f"{where}: found a turn of weight 0 in a chat of {len(turns)} turns of the assistant, for which "
                    f"the chat template of {self._folder} has {len(spans)} generation marks, expected one each; leave "
                    "the chat out"
                )
            spans = [span for span, turn in zip(spans, turns, strict=True) if turn in taught]
        spans = [span for span in spans if span[0] < span[1] or not self._is_marked]
        found = [self._with_its_end(chat.text, span) for span in spans]
        ends = tuple(end for _, end in found if end is not None)
        return Document(chat.text, tuple(span for span, _ in found), ends, chat.left_out)

    def _taken(self, messages: list[Message], tools: Sequence[Tool]) -> _Rendered:
        """The form of a chat of which the template shows most. Raises what it raises of the first if it takes none."""
        best: _Rendered | None = None
        refusal: Exception | None = None
        for form in forms(messages):
            try:
                text, spans = self._rendered(form, tools)
            except Exception as exc:  # noqa: BLE001 - whatever a template raises
                refusal = refusal or exc
                continue
            found = _Rendered(form, text, spans, self._left_out(form, tools, text))
            best = found if best is None or found.faults < best.faults else best
            if not best.faults:
                break
        if best is None:
            assert refusal is not None, "there is one form at least"
            raise refusal
        return best

    def _left_out(self, messages: list[Message], tools: Sequence[Tool], text: str) -> tuple[str, ...]:
        """Kinds of what the messages hold and the template does not show, as marks in its place tell."""
        chat, named, pieces = with_marks(messages, tools, self._unused(messages, tools))
        shown = self._shown(chat, named)
        lost = [piece for piece in pieces if (piece.mark not in shown if shown else piece.text not in text)]
        return tuple(kind for _, kind in dict.fromkeys((piece.turn, piece.kind) for piece in lost))

    def _unused(self, messages: Sequence[Message], tools: Sequence[Tool], count: int = 1) -> str:
        """Characters that occur nowhere in a chat."""
        used = json.dumps([list(messages), list(tools)], ensure_ascii=False)
        return "".join(islice((mark for mark in map(chr, _MARKS) if mark not in used), count))

    def _shown(self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, prompts: bool = False) -> str:
        """The text of a chat; none if the template refuses it."""
        try:
            return self._rendered(messages, tools, add_generation_prompt=prompts)[0]
        except Exception:  # noqa: BLE001 - whatever a template raises
            return ""

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Tool], *, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and the spans of its generation marks. Raises whatever the template does."""
        first, last = tuple(self._unused(messages, tools, 2)) if self._is_marked else ("", "")
        texts, _ = self._render(
            conversations=[list(messages)],
            tools=list(tools) or None,
            chat_template=self._source,
            add_generation_prompt=add_generation_prompt,
            tristill_marks=[first, last],
            **self._tokenizer.special_tokens_map,
        )
        return _without_marks(texts[0], first, last) if self._is_marked else (texts[0], [])

    def _with_its_end(self, text: str, span: Span) -> tuple[Span, Span | None]:
        """A turn with the token that ends it and no white space after that; and where this token is, if there is one.

        Marks may stand around the content alone: then the token is what comes next, unless that begins another turn.
        """
        start, stop = span
        said = text[start:stop].rstrip()
        if ending := next((token for token in self._endings if said.endswith(token)), None):
            stop = start + len(said)
            return (start, stop), (stop - len(ending), stop)
        if self._is_marked:
            rest = text[stop:].lstrip()
            ending = next((token for token in self._endings if rest.startswith(token)), None)
            if ending and not self._opening.lstrip().startswith(ending):
                stop = len(text) - len(rest) + len(ending)
                return (start, stop), (stop - len(ending), stop)
        return span, None

    def _span_of_turn(
        self, messages: Sequence[Message], tools: Sequence[Tool], turn: int, text: str, where: str
    ) -> Span:
        """Where a turn of the assistant is in `text`, the whole chat's; CorpusError if the template does not show it.

        The chat before the turn and the chat that it ends are beginnings of the whole if the template renders every
        turn alike whatever follows it.
        """
        try:
            before = self._before(messages[:turn], tools)
            through, _ = self._rendered(messages[: turn + 1], tools)
            for prompt in () if before is None else (before, _OPEN_REASONING.sub("", before)):
                if text.startswith(through) and through.startswith(prompt):
                    return len(prompt), len(through)
            span = self._span_around_content(messages, tools, turn, text, before)
        except Exception as exc:  # whatever a template raises
            raise CorpusError(
                f"{where}: the chat template of {self._folder} takes this chat of roles {_roles(messages)}, but not "
                f"its beginning up to message {turn + 1} ({exc}), so that the assistant's part of the text is not "
                f"known; {_WAY_OUT}, or leave the chat out"
            ) from exc
        if span is None:
            raise CorpusError(
                f"{where}: the chat template of {self._folder} does not render message {turn + 1} of a chat alike "
                f"whatever follows it, so that the assistant's part of the text is not known; {_WAY_OUT}"
            )
        return span

    def _before(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str | None:
        """A chat with the generation prompt; None if the template does not take it, or leaves the prompt out of it."""
        try:
            text, _ = self._rendered(messages, tools, add_generation_prompt=True)
        except Exception:  # noqa: BLE001 - whatever a template raises
            return None
        return text if text or not self._opening else None

    def _span_around_content(
        self, messages: Sequence[Message], tools: Sequence[Tool], turn: int, text: str, before: str | None
    ) -> Span | None:
        """The span of a turn that is rendered otherwise as the last one; None if it is not plain where it is.

        What stands around the content is what stays when the content becomes a mark that occurs nowhere else. The turn
        begins after the generation prompt, or, where the prompt has more than this turn (an open <think>) or is not
        what stands before the turn (a system message that moves), with the content. It ends with what the template puts
        after the content of a last turn.
        """
        mark = next(chr(code) for code in _MARKS if chr(code) not in text)
        is_in_parts = isinstance(messages[turn].get("content"), list)
        content = [{"type": "text", "text": mark}] if is_in_parts else mark
        marked = [*messages[:turn], {**messages[turn], "content": content}]
        head, _, rest = self._rendered([*marked, *messages[turn + 1 :]], tools)[0].partition(mark)
        ending = self._rendered(marked, tools)[0].rpartition(mark)[2]
        first = before if before is not None and head.startswith(before) else head
        start, stop = len(first), len(text) - len(rest) + len(ending)
        is_plain = text.startswith(first) and text.endswith(rest) and rest.startswith(ending) and start <= stop
        return (start, stop) if is_plain else None


_WAY_OUT = (
    "put {% generation %} and {% endgeneration %} around what the assistant says in that template, as docs/methods.md "
    "shows"
)


def _roles(messages: Sequence[Message]) -> list[str]:
    return [message["role"] for message in messages]


def _with_own_marks(template: str) -> str:
    """The template with a macro in place of `generation` that prints a mark before and after what it holds.

    Those are found wherever the text goes, through macros and variables too.
    """
    macro = (
        "{% macro tristill_generation() %}{{ tristill_marks[0] }}{{ caller() }}{{ tristill_marks[1] }}{% endmacro %}"
    )
    body = _GENERATION.sub(
        lambda found: f"{{%{found[1]} {'endcall' if found[2] else 'call tristill_generation()'} {found[3]}%}}", template
    )
    return f"{macro}\n{body}"


def _without_marks(text: str, first: str, last: str) -> tuple[str, list[Span]]:
    """The text without the two marks, and the spans between them."""
    pieces, spans, length = [], [], 0
    for number, part in enumerate(text.split(first)):
        inside, _, after = part.partition(last) if number else ("", "", part)
        if number:
            spans.append((length, length + len(inside)))
        pieces += [inside, after]
        length += len(inside) + len(after)
    return "".join(pieces), spans


def _with_fixed_date(template: str) -> str:
    """The template with a `strftime_now` of its own, for which it is always TODAY at midnight.

    A macro, since transformers hands templates data but no functions. Its line is one that jinja renders as nothing.
    """
    texts = json.dumps({f"%{directive}": TODAY.strftime(f"%{directive}") for directive in _DIRECTIVES})
    macro = (
        "{% macro strftime_now(format) %}{% set today = namespace(text=format) %}"
        f"{{% for directive, text in {texts}.items() %}}"
        "{% set today.text = today.text.replace(directive, text) %}{% endfor %}{{ today.text }}{% endmacro %}"
    )
    return f"{macro}\n{template}"


def assistant_tokens(
    document: Document, encoding: Encoding, special_ids: frozenset[int], end_of_text_id: int
) -> tuple[list[int], np.ndarray, int]:
    """(ids with the end of text, uint8 (n,) 1 where a token is the assistant's, bytes of text of these tokens).

    A token is the assistant's if its last character is; of one that takes the white space around it too, its own
    characters count. So is the end of text, if the chat ends with a turn that no other token ends. Special tokens and
    those that end turns are of no bytes, as the end of text is in any corpus.
    """
    assert document.assistant is not None, "chats alone have one"
    text, ids = document.text, [*encoding.ids, end_of_text_id]
    offsets = encoding.offsets
    own = [
        offset if token == token.strip() else _own_characters(text, *offset)
        for offset, token in zip(offsets, encoding.tokens, strict=True)
    ]
    ends = np.array([end for _, end in own])
    turn_ends = set(document.ends)
    has_no_bytes = [
        token_id in special_ids or offset in turn_ends for token_id, offset in zip(encoding.ids, own, strict=True)
    ]
    is_assistants = np.zeros(len(ids), np.uint8)
    text_bytes = 0
    for start, stop in document.assistant:
        inside = np.flatnonzero((start < ends) & (ends <= stop))
        if not len(inside):
            continue
        is_assistants[inside] = 1
        last = int(inside[-1])
        if last == len(ids) - 2 and not has_no_bytes[last]:
            is_assistants[-1] = 1
        said_from = max(start, offsets[inside[0]][0])
        text_bytes += _num_bytes(text[said_from : ends[last]])
        for first, end in (offsets[k] for k in np.flatnonzero(has_no_bytes)):
            text_bytes -= _num_bytes(text[max(first, said_from) : min(end, ends[last])])
    return ids, is_assistants, text_bytes


def _own_characters(text: str, first: int, end: int) -> Span:
    """Where a token stands that was added with lstrip or rstrip: its text has the white space around it."""
    said = text[first:end].strip()
    start = text.find(said, first, end)
    return (start, start + len(said)) if said else (first, end)


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", errors="surrogatepass"))


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the special tokens."""
    return frozenset(token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
