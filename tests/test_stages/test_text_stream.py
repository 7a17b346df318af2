"""Streamed text is whole characters, as soon as they are whole, and all of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_like import ROCKET, SENTENCEPIECE
from tokenizers import Tokenizer, decoders, models

from tristill.stages.data.config import TrainedTokenizer
from tristill.stages.data.text_stream import TextStream
from tristill.stages.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(
    TrainedTokenizer(vocab_size=300, train_bytes=1000), ["a few words and a few more of these words"] * 3
)


def ids_of_bytes(data: bytes) -> list[int]:
    """One token a byte: every character but those of ASCII is cut."""
    alphabet = byte_symbols()
    return [TOKENIZER.token_to_id(alphabet[byte]) for byte in data]


def byte_symbols() -> list[str]:
    """GPT-2's: printable bytes are themselves, the others follow from 256 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


def pieces(ids: list[int], prompt: list[int] | None = None, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    stream = TextStream(tokenizer, prompt or [])
    return [*(stream.add(new_id) for new_id in ids), stream.finish()]


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=12) | st.text(max_size=6).map(lambda text: text.encode("utf-8")), st.binary(max_size=4))
def test_pieces_joined_are_the_text_of_all_ids(data: bytes, prompt: bytes) -> None:
    ids, before = ids_of_bytes(data), ids_of_bytes(prompt.decode("utf-8", errors="ignore").encode("utf-8"))
    assert "".join(pieces(ids, before)) == TOKENIZER.decode(before + ids)[len(TOKENIZER.decode(before)) :]


@given(st.text(max_size=20))
def test_a_character_appears_with_its_last_byte_and_never_in_parts(text: str) -> None:
    for character, part in zip(text, whole_characters(text), strict=True):
        assert part[:-1] == [""] * (len(part) - 1)
        assert part[-1] == (character if character != "\ufffd" else "")


def whole_characters(text: str) -> list[list[str]]:
    """The pieces of each character's bytes."""
    stream = TextStream(TOKENIZER)
    found = []
    for character in text:
        found.append([stream.add(new_id) for new_id in ids_of_bytes(character.encode("utf-8"))])
        if character == "\ufffd":  # held back until something follows
            stream = TextStream(TOKENIZER)
    return found


def test_bytes_that_are_no_character_are_shown_once_something_follows_them() -> None:
    euro = "\u20ac".encode()
    assert pieces(ids_of_bytes(b"a" + euro + b"b")) == ["a", "", "", "\u20ac", "b", ""]
    assert pieces(ids_of_bytes(b"a" + euro[:2] + b"b")) == ["a", "", "", "\ufffdb", ""]
    assert pieces(ids_of_bytes(b"a" + euro[:2])) == ["a", "", "", "\ufffd"]
    assert pieces(ids_of_bytes(b"\xff\xff" + euro)) == ["", "\ufffd", "\ufffd", "", "\u20ac", ""]


@pytest.mark.parametrize("prompt", [[], [0], [0, 1]])
def test_spaces_between_words_survive_a_decoder_that_strips_the_first(prompt: list[int]) -> None:
    vocabulary = {"\u2581one": 0, "\u2581two": 1, "more": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "more"))
    tokenizer.decoder = decoders.Metaspace()
    ids = [0, 1, 2, 1]
    expected = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
    assert "".join(pieces(ids, prompt, tokenizer)) == expected


@settings(deadline=None, max_examples=100)
@given(
    ids=st.lists(st.sampled_from([*ROCKET, *ROCKET, *range(259, 265), 0, 2, 3 + 0x41, 3 + 0xFF]), max_size=14)
    | st.text(max_size=6).map(lambda text: SENTENCEPIECE.encode(text, add_special_tokens=False).ids),
    prompt=st.sampled_from(["", "hi", "a \U0001f680", "b\u00e9"]),
)
def test_byte_fallback_gives_the_characters_that_decoding_all_ids_gives(ids: list[int], prompt: str) -> None:
    before = SENTENCEPIECE.encode(prompt + "a", add_special_tokens=False).ids
    expected = SENTENCEPIECE.decode(before + ids)[len(SENTENCEPIECE.decode(before)) :]
    assert "".join(pieces(ids, before, SENTENCEPIECE)) == expected


def test_a_character_of_fallback_bytes_appears_whole() -> None:
    a = SENTENCEPIECE.token_to_id("a")
    assert pieces([a, *ROCKET, a], tokenizer=SENTENCEPIECE) == ["a", "", "", "", "", "\U0001f680a", ""]
    assert pieces([a, *ROCKET, 2, *ROCKET], tokenizer=SENTENCEPIECE)[-1] == "\U0001f680" * 2
    assert pieces([a, *ROCKET[:3], a], tokenizer=SENTENCEPIECE) == ["a", "", "", "", "\ufffd\ufffd\ufffda", ""]
