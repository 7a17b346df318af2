"""Token ids as text that people can read."""

from collections.abc import Iterable
from pathlib import Path

from stages.data.tokenizer import load_tokenizer

_NOT_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def token_texts(tokenizer_json: Path, ids: Iterable[int]) -> dict[int, str]:
    """Every id as quoted text; one whose bytes are no whole character as the vocabulary spells it, in angle brackets.

    An id that the tokenizer does not know is given as its number.
    """
    tokenizer = load_tokenizer(tokenizer_json)

    def text_of(token_id: int) -> str:
        spelling = tokenizer.id_to_token(token_id)
        if spelling is None:
            return f"<{token_id}>"
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        return repr(text) if text and _NOT_A_CHARACTER not in text else f"<{spelling}>"

    return {token_id: text_of(token_id) for token_id in set(ids)}
