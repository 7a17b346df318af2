"""Text of ids as they come, in whole characters."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from tristill.stages.data.chat import special_ids

_UNDECODABLE = "\ufffd"


def fallback_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tokens of single bytes, <0x00> to <0xFF>; none if its decoder takes them for text."""
    found = {byte: tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    known = frozenset(token_id for token_id in found.values() if token_id is not None)
    sample = found[ord("A")]
    return known if sample is not None and tokenizer.decode([sample]) == "A" else frozenset()


class TextStream:
    """Turns ids into text one by one; a character appears with the id that completes it.

    A token of byte-level BPE may end within a character, whose first bytes alone decode to one U+FFFD: such a last
    character is held back until the next id, or `finish`, says what it is. So is a run of tokens of single bytes (byte
    fallback of SentencePiece), which decodes to its characters if all of it is UTF-8, else to one U+FFFD a byte.
    Joined, the pieces are what decoding all ids at once gives. Only the ids since the last whole character but one are
    decoded again.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """The ids follow those of a prompt, whose text is not given again."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped_ids = special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._byte_ids = fallback_ids(tokenizer)
        self._ids: list[int] = []
        self._num_whole = 0  # of these ids, at the last whole character
        self._num_given = 0  # characters of their text
        self._go_on_from(list(prompt_ids))

    def add(self, new_id: int) -> str:
        """What the id adds to the text, as far as that is known; maybe nothing."""
        if new_id in self._skipped_ids:
            return ""
        self._ids.append(new_id)
        if new_id in self._byte_ids:
            return ""
        text = self._decoded()
        is_whole = not text.endswith(_UNDECODABLE)
        known = text if is_whole else text[:-1]
        added, self._num_given = known[self._num_given :], len(known)
        if is_whole and added:
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
