"""Tokens as text: whole characters, and nothing in them that a terminal would obey."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_like import ROCKET, SENTENCEPIECE
from tokenizers import Tokenizer, decoders, models

from tristill.stages.data.config import TrainedTokenizer
from tristill.stages.data.token_text import text_pieces, token_texts
from tristill.stages.data.tokenizer import END_OF_TEXT, train_tokenizer

TOKENIZER = train_tokenizer(
    TrainedTokenizer(vocab_size=300, train_bytes=1000), ["a few words and a few more of these words"] * 3
)


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(TOKENIZER.to_str())
    return path


@settings(deadline=None, max_examples=40)
@given(
    ids=st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=20)
    | st.text().map(lambda text: TOKENIZER.encode(text).ids)
)
def test_pieces_are_the_text_of_all_ids_and_take_every_token_once(tokenizer_json: Path, ids: list[int]) -> None:
    found = list(text_pieces(tokenizer_json, ids))
    assert "".join(text for _, text in found) == TOKENIZER.decode(ids, skip_special_tokens=False)
    assert sum(num_tokens for num_tokens, _ in found) == len(ids)
    assert all(num_tokens for num_tokens, _ in found)


def test_a_character_of_several_tokens_is_one_piece(tokenizer_json: Path) -> None:
    ids = TOKENIZER.encode("a\u4f60!").ids
    assert len(ids) == 5
    assert list(text_pieces(tokenizer_json, ids)) == [(1, "a"), (3, "\u4f60"), (1, "!")]


def test_bytes_of_byte_fallback_are_one_piece_and_spelled_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(SENTENCEPIECE.to_str())
    ids = SENTENCEPIECE.encode("hi \U0001f680 a", add_special_tokens=False).ids
    assert "".join(text for _, text in text_pieces(path, ids)) == "hi \U0001f680 a"
    assert text_pieces(path, [*ROCKET, *ROCKET[:1]]) == [(5, "\ufffd" * 5)]
    assert text_pieces(path, ROCKET) == [(4, "\U0001f680")]
    assert token_texts(path, ROCKET[:1]) == {ROCKET[0]: "<0xF0>"}


def test_special_tokens_and_ids_that_are_not_known_are_pieces_of_their_own(tokenizer_json: Path) -> None:
    end, (a,), first_byte = (
        TOKENIZER.token_to_id(END_OF_TEXT),
        TOKENIZER.encode("a").ids,
        TOKENIZER.encode("\u4f60").ids[0],
    )
    assert list(text_pieces(tokenizer_json, [a, end, 900, a])) == [(1, "a"), (1, END_OF_TEXT), (1, "<900>"), (1, "a")]
    assert list(text_pieces(tokenizer_json, [first_byte, 900])) == [(1, "\ufffd"), (1, "<900>")]


def test_a_vocabulary_that_holds_escape_sequences_gives_none_away(tmp_path: Path) -> None:
    unknown = "\x1b[2J"
    tokenizer = Tokenizer(models.WordLevel({unknown: 0, "\x1b]0;title\x07": 1}, unk_token=unknown))
    tokenizer.decoder = decoders.Replace("\x1b[2J", "")  # so that the first decodes to nothing and is spelled
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert token_texts(tmp_path / "tokenizer.json", [0, 1, 2]) == {0: "<\u241b[2J>", 1: r"'\x1b]0;title\x07'", 2: "<2>"}
