"""Token ids as text that people can read: no control character of a token comes out of here as it is."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from tristill.stages.data.text_stream import TextStream, fallback_ids
from tristill.stages.data.tokenizer import load_tokenizer
from tristill.stages.visible import visible

_NOT_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def token_texts(tokenizer_json: Path, ids: Iterable[int]) -> dict[int, str]:
    """Every id as quoted text; one whose bytes are no whole character as the vocabulary spells it, in angle brackets.

    An id that the tokenizer does not know is given as its number. What cannot be printed is escaped as in Python.
    """
    tokenizer = load_tokenizer(tokenizer_json)
    byte_ids = fallback_ids(tokenizer)

    def text_of(token_id: int) -> str:
        spelling = tokenizer.id_to_token(token_id)
        if spelling is None:
            return f"<{token_id}>"
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        if text and _NOT_A_CHARACTER not in text:
            return repr(text)
        return spelling if token_id in byte_ids else f"<{visible(spelling)}>"

    return {token_id: text_of(token_id) for token_id in set(ids)}


def text_pieces(tokenizer_json: Path, ids: Sequence[int]) -> list[tuple[int, str]]:
    """The text of all ids as it is, in pieces of whole characters, each with the number of tokens that it took.

    Numbers are positive and add up to that of the ids. Bytes that never become a character are U+FFFD; an id that the
    tokenizer does not know is its number in angle brackets.
    """
    tokenizer = load_tokenizer(tokenizer_json)
    pieces: list[tuple[int, str]] = []
    num_tokens = 0
    for is_known, run in itertools.groupby(ids, lambda token_id: tokenizer.id_to_token(token_id) is not None):
        if not is_known:
            pieces += [(1, f"<{token_id}>") for token_id in run]
            continue
        stream = TextStream(tokenizer, skip_special_tokens=False)
        for token_id in run:
            num_tokens += 1
            if text := stream.add(token_id):
                pieces.append((num_tokens, text))
                num_tokens = 0
        if num_tokens:
            pieces.append((num_tokens, stream.finish()))
            num_tokens = 0
        elif held_back := stream.finish():  # of a token that ended another character too
            count, text = pieces.pop()
            pieces.append((count, text + held_back))
    return pieces
