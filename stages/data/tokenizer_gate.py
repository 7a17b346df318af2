"""Whether two tokenizers give every text the same ids: compared by what they hold, not by size or by bytes of files."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tristill.cache.hashing import canonical_json
from tristill.stages.data.config import ExistingTokenizer, TrainedTokenizer
from tristill.stages.data.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_file
from tristill.stages.errors import TokenizerError
from tristill.stages.models.companions import SpecialIds
from tristill.stages.models.description import TOKENIZER_NAME

_SHOWN = 5
_PARTS = ("normalizer", "pre_tokenizer")
"""What becomes of a text before the model. Post-processors add tokens around texts, and are not used here."""


def tokenizer_difference(found: Path, expected: Path) -> str | None:
    """What differs, the first ids that do named; None if every text has the same ids in both."""
    if found.read_bytes() == expected.read_bytes():
        return None
    mine, theirs = load_tokenizer(found), load_tokenizer(expected)
    texts, wanted = _texts_by_id(mine), _texts_by_id(theirs)
    differing = sorted(i for i in texts.keys() | wanted.keys() if texts.get(i) != wanted.get(i))
    if differing:
        shown = ", ".join(f"id {i} is {_named(texts.get(i))}, not {_named(wanted.get(i))}" for i in differing[:_SHOWN])
        return f"{len(differing)} of {max(len(texts), len(wanted))} ids differ: {shown}"
    one, other = json.loads(mine.to_str()), json.loads(theirs.to_str())
    parts = [name for name in _PARTS if canonical_json(one.get(name)) != canonical_json(other.get(name))]
    parts += [f"model.{key}" for key in _model_differences(one["model"], other["model"])]
    if _special(one) != _special(other):
        parts.append("added_tokens")
    return f"its ids are the same, but {', '.join(parts)} differ, so texts are cut otherwise" if parts else None


def require_same_tokenizer(found: Path, expected: Path, what: str, advice: str) -> None:
    """Raise TokenizerError unless both give every text the same ids. what: whose tokenizer `found` is."""
    if not found.is_file():
        raise TokenizerError(
            f"{found}: is missing; the ids that a model knows are those of its own tokenizer (one of SentencePiece is "
            "turned into tokenizer.json by transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )
    difference = tokenizer_difference(found, expected)
    if difference is not None:
        raise TokenizerError(f"{found}: the tokenizer of {what} is not that of {expected}: {difference}; {advice}")


def refuse_other_tokenizer(config: TrainedTokenizer | ExistingTokenizer, model: Path, named: Path) -> None:
    """Raise TokenizerError if the tokenizer of a config is known not to be that of a given teacher, before it is made.

    A trained one has at most as many ids as are wanted, the end of text first. named: the model as the user names it.
    """
    own, advice = model / TOKENIZER_NAME, f"set data.tokenizer to {own_tokenizer(model, named)}"
    if isinstance(config, ExistingTokenizer):
        require_same_tokenizer(own, tokenizer_file(config), "the teacher", advice)
    elif own.is_file():
        ids = _texts_by_id(load_tokenizer(own))
        if len(ids) > config.vocab_size or ids.get(0) != END_OF_TEXT:
            raise TokenizerError(
                f"data.tokenizer: found a BPE to be trained here, of {config.vocab_size:,} ids, but the teacher "
                f"{named} knows the {len(ids):,} ids of its own tokenizer; {advice}"
            )


def own_tokenizer(model: Path, named: Path) -> str:
    """The value of data.tokenizer that takes a model's own, with its end of text where it has not the usual one."""
    end = ""
    if (model / TOKENIZER_NAME).is_file():
        tokenizer, eos = load_tokenizer(model / TOKENIZER_NAME), SpecialIds.of(model).eos
        if tokenizer.token_to_id(END_OF_TEXT) is None and eos is not None:
            end = f", end_of_text = '{tokenizer.id_to_token(eos)}'"
    return f"{{ kind = 'file', path = '{named}'{end} }}"


def _texts_by_id(tokenizer: Tokenizer) -> dict[int, str]:
    return {token_id: text for text, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}


def _named(text: str | None) -> str:
    return "none" if text is None else repr(text)


def _model_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Of the model's settings and merges; the vocabulary was compared by ids."""
    by_id = {"vocab"} if isinstance(one.get("vocab"), dict) else set()  # a list of Unigram has scores too
    keys = sorted((one.keys() | other.keys()) - by_id)
    return [key for key in keys if canonical_json(one.get(key)) != canonical_json(other.get(key))]


def _special(tokenizer: dict[str, Any]) -> list[str]:
    added = tokenizer.get("added_tokens") or []
    return sorted(canonical_json({k: v for k, v in token.items() if k != "special"}) for token in added)
