"""Chats as text, by the chat template of a Hugging Face folder, and which of their tokens are the assistant's.

transformers renders them (extra `hf`); the tokens are those of the run's own tokenizer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from stages.errors import CorpusError, TokenizerError

Message = dict[str, Any]
Span = tuple[int, int]
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = range(0xE000, 0xF900)  # Unicode's area for private use
TODAY = date(2024, 7, 26)
"""What `strftime_now` of a template says today is, so that tokens do not change overnight: a date of Llama 3's."""
_DIRECTIVES = [*"aAbBcdDeFGhHIjmMpSTuUVwWxXyY", *(f"-{of}" for of in "dHIjmMSy"), "%"]


@dataclass(frozen=True)
class Document:
    """Text of the corpus. assistant: of a chat, where the assistant speaks, (first, end) characters; None if plain."""

    text: str
    assistant: tuple[Span, ...] | None = None


class ChatTemplate:
    """The chat template of a folder.

    What is the assistant's is what stands between its `{% generation %}` marks; without marks, what a turn of the
    assistant adds to the chat before it with the generation prompt. Today is always TODAY.
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
        self._source = _with_fixed_date(source) if "strftime_now" in source else source
        self._is_marked = _GENERATION_MARK.search(source) is not None

    def document(self, messages: Sequence[Message], where: str) -> Document:
        """A chat as one document. Raises CorpusError, naming `where`, if the template does not take it."""
        try:
            text, spans = self._rendered(messages, add_generation_prompt=False)
        except Exception as exc:  # whatever a template raises
            raise CorpusError(
                f"{where}: the chat template of {self._folder} refuses this chat of roles {_roles(messages)} ({exc}); "
                "correct the chat, or leave it out"
            ) from exc
        if not self._is_marked:
            turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
            spans = [self._span_of_turn(messages, turn, text, where) for turn in turns]
        return Document(text, tuple(spans))

    def _rendered(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> tuple[str, list[Span]]:
        """The text, and the spans of its generation marks. Raises whatever the template does."""
        texts, spans = self._render(
            conversations=[list(messages)],
            chat_template=self._source,
            return_assistant_tokens_mask=self._is_marked,
            add_generation_prompt=add_generation_prompt,
            **self._tokenizer.special_tokens_map,
        )
        return texts[0], [tuple(span) for span in spans[0]] if spans else []

    def _span_of_turn(self, messages: Sequence[Message], turn: int, text: str, where: str) -> Span:
        """Where a turn of the assistant is in `text`, the whole chat's; CorpusError if the template does not show it.

        The chat before the turn and the chat that it ends are beginnings of the whole if the template renders every
        turn alike whatever follows it.
        """
        try:
            before, _ = self._rendered(messages[:turn], add_generation_prompt=True)
            through, _ = self._rendered(messages[: turn + 1], add_generation_prompt=False)
            if text.startswith(through) and through.startswith(before):
                return len(before), len(through)
            span = self._span_around_content(messages, turn, text, before)
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

    def _span_around_content(self, messages: Sequence[Message], turn: int, text: str, before: str) -> Span | None:
        """The span of a turn that is rendered otherwise as the last one; None if it is not plain where it is.

        What stands around the content is what stays when the content becomes a mark that occurs nowhere else. The turn
        begins after the generation prompt, or, where the prompt has more than this turn (an open <think>), with the
        content. It ends with what the template puts after the content of a last turn.
        """
        mark = next(chr(code) for code in _MARKS if chr(code) not in text)
        marked = [*messages[:turn], {**messages[turn], "content": mark}]
        head, _, rest = self._rendered([*marked, *messages[turn + 1 :]], add_generation_prompt=False)[0].partition(mark)
        ending = self._rendered(marked, add_generation_prompt=False)[0].rpartition(mark)[2]
        first, longer = sorted([head, before], key=len)
        start, stop = len(first), len(text) - len(rest) + len(ending)
        is_plain = (
            longer.startswith(first) and text.startswith(first) and text.endswith(rest) and rest.startswith(ending)
        )
        return (start, stop) if is_plain else None


_WAY_OUT = (
    "put {% generation %} and {% endgeneration %} around what the assistant says in that template, as docs/methods.md "
    "shows"
)


def _roles(messages: Sequence[Message]) -> list[str]:
    return [message["role"] for message in messages]


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

    A token is the assistant's if its last character is. So is the special token that ends its turn, but no white space
    after it. Special tokens are of no bytes, as the end of text is in any corpus.
    """
    assert document.assistant is not None, "chats alone have one"
    ids = [*encoding.ids, end_of_text_id]
    offsets = [*encoding.offsets, (len(document.text), len(document.text))]
    is_special = np.array([token_id in special_ids for token_id in ids])
    ends = np.array([end for _, end in offsets])
    is_assistants = np.zeros(len(ids), np.uint8)
    text_bytes = 0
    for start, stop in document.assistant:
        inside = np.flatnonzero((start < ends[:-1]) & (ends[:-1] <= stop))
        specials = inside[is_special[inside]]
        if len(specials) and not document.text[ends[specials[-1]] : stop].strip():
            inside = inside[inside <= specials[-1]]
        if not len(inside):
            continue
        is_assistants[inside] = 1
        last = int(inside[-1])
        if not is_special[last] and is_special[last + 1]:
            is_assistants[last + 1] = 1
        text_bytes += len(document.text[start : ends[last]].encode("utf-8", errors="surrogatepass"))
        for first, end in (offsets[k] for k in specials):
            text_bytes -= len(document.text[first:end].encode("utf-8", errors="surrogatepass"))
    return ids, is_assistants, text_bytes


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the special tokens."""
    return frozenset(token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
