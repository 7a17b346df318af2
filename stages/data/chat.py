"""Chats as text, by the chat template of a Hugging Face folder, and which of their tokens are the assistant's.

transformers renders them (extra `hf`); the tokens are those of the run's own tokenizer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from stages.errors import CorpusError, TokenizerError

Message = dict[str, Any]
Span = tuple[int, int]
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Document:
    """Text of the corpus. assistant: of a chat, where the assistant speaks, (first, end) characters; None if plain."""

    text: str
    assistant: tuple[Span, ...] | None = None


class ChatTemplate:
    """The chat template of a folder.

    What is the assistant's is what stands between its `{% generation %}` marks; without marks, what a turn of the
    assistant adds to the chat before it with the generation prompt.
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
            self._source: str = self._tokenizer.get_chat_template()
        except Exception as exc:  # the library raises many kinds
            first_line = (str(exc).splitlines() or [""])[0]
            raise TokenizerError(
                f"{folder}: found no tokenizer with a chat template that transformers loads ({type(exc).__name__}: "
                f"{first_line}); put a chat_template.jinja there, or read a text column"
            ) from exc
        self._folder = folder
        self._render: Any = render_jinja_template
        self._is_marked = _GENERATION_MARK.search(self._source) is not None

    def document(self, messages: Sequence[Message], where: str) -> Document:
        """A chat as one document. Raises CorpusError, naming `where`, if the template does not take it."""
        text, spans = self._rendered(messages, where, add_generation_prompt=False)
        if not self._is_marked:
            spans = self._spans_of_turns(messages, text, where)
        return Document(text, tuple(spans))

    def _rendered(
        self, messages: Sequence[Message], where: str, *, add_generation_prompt: bool
    ) -> tuple[str, list[Span]]:
        """The text, and the spans of its generation marks."""
        try:
            texts, spans = self._render(
                conversations=[list(messages)],
                chat_template=self._source,
                return_assistant_tokens_mask=self._is_marked,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as exc:  # whatever a template raises
            raise CorpusError(
                f"{where}: the chat template of {self._folder} refuses this chat of roles "
                f"{[message['role'] for message in messages]} ({exc}); correct the chat, or leave it out"
            ) from exc
        return texts[0], [tuple(span) for span in spans[0]] if spans else []

    def _spans_of_turns(self, messages: Sequence[Message], text: str, where: str) -> list[Span]:
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._rendered(messages[:turn], where, add_generation_prompt=True)
            through, _ = self._rendered(messages[: turn + 1], where, add_generation_prompt=False)
            if not (text.startswith(through) and through.startswith(before)):
                raise CorpusError(
                    f"{where}: the chat template of {self._folder} does not render message {turn + 1} of a chat alike "
                    "whatever follows it, so that the assistant's part of the text is not known; put {% generation %} "
                    "and {% endgeneration %} around what the assistant says in that template"
                )
            spans.append((len(before), len(through)))
        return spans


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
