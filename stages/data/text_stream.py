"""Text of ids as they come, in whole characters."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_UNDECODABLE = "\ufffd"


class TextStream:
    """Turns ids into text one by one; a character appears with the id that completes it.

    A token of byte-level BPE may end within a character, whose first bytes alone decode to one U+FFFD: such a last
    character is held back until the next id, or `finish`, says what it is. Joined, the pieces are what decoding all ids
    at once gives. Only the ids since the last whole character but one are decoded again.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """The ids follow those of a prompt, whose text is not given again."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._num_whole = 0  # of these ids, at the last whole character
        self._num_given = 0  # characters of their text
        self._go_on_from(list(prompt_ids))

    def add(self, new_id: int) -> str:
        """What the id adds to the text, as far as that is known; maybe nothing."""
        self._ids.append(new_id)
        text = self._decoded()
        is_whole = not text.endswith(_UNDECODABLE)
        known = text if is_whole else text[:-1]
        added, self._num_given = known[self._num_given :], len(known)
        if is_whole:
            self._go_on_from(self._ids[self._num_whole :])
        return added

    def finish(self) -> str:
        """What was held back."""
        return self._decoded()[self._num_given :]

    def _go_on_from(self, ids: list[int]) -> None:
        """Keep these as what comes before: some decoders leave out a space before the first id."""
        self._ids = ids
        self._num_whole = len(ids)
        self._num_given = len(self._decoded())

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens))
