"""A tokenizer.json of others: read without waiting, and refused if its rules lengthen texts beyond reason."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers

from tristill.stages.errors import TokenizerError
from tristill.stages.tokenizer_file import growth, load_tokenizer, panics_named


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(parts: list[dict[str, Any]], key: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", key: parts}


TOKENIZER = json.loads(Tokenizer(models.WordLevel({"a": 0}, "a")).to_str())
KEYS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
LETTERS = st.text("ab\u00e9", max_size=4)


@settings(deadline=None)
@given(
    rules=st.lists(st.tuples(st.text("ab\u00e9", min_size=1, max_size=3), LETTERS, st.booleans()), max_size=4),
    form=st.sampled_from(["NFD", "NFKD", "Lowercase"]),
    text=st.text("ab\u00e9", min_size=1, max_size=12),
)
def test_no_text_grows_more_than_is_foretold(rules: list[tuple[str, str, bool]], form: str, text: str) -> None:
    parts = [replace(pattern, content, "Regex" if is_regex else "String") for pattern, content, is_regex in rules]
    parts.insert(len(parts) // 2, {"type": form})
    applied = normalizers.Sequence(
        [
            getattr(normalizers, part["type"])()
            if part["type"] != "Replace"
            else normalizers.Replace(part["pattern"].get("String") or Regex(part["pattern"]["Regex"]), part["content"])
            for part in parts
        ]
    )
    assert len(applied.normalize_str(text)) <= growth({"normalizer": sequence(parts)}) * len(text) + 1e-6


@pytest.mark.parametrize(
    "parts",
    [
        [replace("a", "aa")] * 30,
        [replace("a", "bb"), replace("b", "aa")] * 15,
        [replace("ab", "abab"), replace("a", "a")] * 30,
        [replace("a", "aa", "Regex")] * 30,
        [replace("(?=a)", "a", "Regex")] * 30,
        [sequence([replace("a", "\ufdfa" * 2), {"type": "NFKD"}, replace("\u0644", "a")])] * 10,
        [replace("a", "a" * 100_000)],
        [{"type": "ByteLevel"}] * 20,
    ],
    ids=["doubling", "in turns", "of two", "regex", "empty match", "unicode", "at once", "bytes"],
)
@pytest.mark.parametrize("place", KEYS)
def test_rules_that_lengthen_a_text_beyond_reason_are_refused_before_they_run(
    tmp_path: Path, parts: list[dict[str, Any]], place: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(TOKENIZER | {place: sequence(parts, KEYS[place])}))
    with pytest.raises(TokenizerError, match=r"its rules may lengthen a text by more than 1,000 times"):
        load_tokenizer(path)


def test_rules_of_real_tokenizers_are_taken() -> None:
    llama = sequence([{"type": "Prepend", "prepend": "\u2581"}, replace(" ", "\u2581")])
    albert = [replace("``", '"'), replace("''", '"'), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]
    albert += [{"type": "Precompiled"}, replace(" {2,}", " ", "Regex")]
    spelled = [
        replace(letter, "...") for letter in "\u2026\u2014\u2013\u00e6\u0153\u00bd\u00bc\u00be\u2122\u00a9\u00ae"
    ]
    byte_level = sequence([{"type": "Split"}, {"type": "ByteLevel"}], "pretokenizers")
    for parts in (llama, sequence(albert), sequence(spelled)):
        assert growth({"normalizer": parts, "pre_tokenizer": byte_level}) <= 1000


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "words", "list", "deep"])
def test_what_is_no_tokenizer_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tokenizer.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text({"words": "words", "list": "[1]", "deep": "[" * 200_000}[kind])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read as a tokenizer\.json"):
        load_tokenizer(path)


def test_a_panic_of_the_library_names_the_file(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "^(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**TOKENIZER, "pre_tokenizer": split}))
    tokenizer = load_tokenizer(path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: tokenizers fails with it"), panics_named(path):
        tokenizer.encode("a" * 60 + "b")
