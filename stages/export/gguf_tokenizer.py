"""A `tokenizer.json` as llama.cpp reads one: byte-level BPE with a pre-tokenizer that llama.cpp knows by name."""

import re
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tristill.cache.regular_file import read_json_object
from tristill.stages.errors import ExportError, TokenizerError
from tristill.stages.export.packages import import_gguf
from tristill.stages.models.companions import SpecialIds
from tristill.stages.tokenizer_file import LARGEST_TOKENIZER_BYTES

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NOT_OURS = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}


ROLE_KEYS = {
    "bos": "bos",
    "eos": "eos",
    "pad": "padding",
    "unk": "unknown",
    "sep": "seperator",
    "mask": "mask",
    "eot": "eot",
    "eom": "eom",
}
"""Roles of special ids, and what their keys in a file begin with, `tokenizer.ggml.<key>_token_id`."""
ADDED_ROLES = ("bos", "eos")
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9]")


class TokenType(IntEnum):
    """What llama.cpp takes a token for."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class GgufTokenizer:
    """Token texts and types by id, and merges in order of rank.

    special: ids by role, such as `bos`; adds: whether a runtime puts `bos` or `eos` around a text. templates: of chats,
    by name.
    """

    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    special: dict[str, int]
    adds: dict[str, bool]
    templates: dict[str, str]


def gguf_tokenizer(path: Path, vocab_size: int, end_of_text_id: int) -> GgufTokenizer:
    """The tokenizer in `path` and what goes with it, with one token for each of the model's `vocab_size` ids.

    Raises ExportError, with all reasons, for a tokenizer that llama.cpp would take for another one.
    """
    content, vocab, pre = _checked(path, vocab_size)
    model = content["model"]
    texts = {token_id: text for text, token_id in vocab.items()}
    added = {one["id"]: one for one in content["added_tokens"]}
    tokens, types = [], []
    for token_id in range(vocab_size):
        tokens.append(texts.get(token_id, f"[PAD{token_id}]"))
        if token_id not in texts:
            types.append(TokenType.UNUSED)
        elif token_id in added:
            types.append(TokenType.CONTROL if added[token_id]["special"] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not merges:  # llama.cpp refuses a BPE without any; two control tokens never meet in one word
        control = next(text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL)
        merges = [f"{control} {control}"]
    special, adds, templates = _special(path, vocab_size, end_of_text_id)
    return GgufTokenizer(pre, tuple(tokens), tuple(types), tuple(merges), special, adds, templates)


def refuse_gguf_tokenizer(path: Path, vocab_size: int) -> None:
    """Raises ExportError, with all reasons, for a tokenizer that llama.cpp would take for another one."""
    _checked(path, vocab_size)


def _checked(path: Path, vocab_size: int) -> tuple[dict[str, Any], dict[str, int], str]:
    """The file, the ids of its texts, and llama.cpp's name of its pre-tokenizer."""
    try:
        content = read_json_object(path, LARGEST_TOKENIZER_BYTES)
        model: dict[str, Any] = content["model"]
        pre = _pre_tokenizer(content.get("pre_tokenizer"))
        vocab: dict[str, int] = {one["content"]: one["id"] for one in content["added_tokens"]}
        if (kind := model.get("type", "BPE")) == "BPE":
            vocab = {**model["vocab"], **vocab}
            problems = _problems(content, vocab_size, vocab, pre)
        else:
            problems = [f"model: found {kind}, expected BPE over bytes"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise TokenizerError(f"{path}: cannot be read as a tokenizer.json of a BPE ({exc!r})") from exc
    if problems:
        raise ExportError(
            f"{path}: llama.cpp would not make the same ids: {'; '.join(problems)}; use `--format hf`, or a tokenizer "
            "that `tristill tokenize` trains"
        )
    assert pre is not None, "that would be a problem"
    return content, vocab, pre


def _special(
    path: Path, vocab_size: int, end_of_text_id: int
) -> tuple[dict[str, int], dict[str, bool], dict[str, str]]:
    """Special ids, what is put around texts and chat templates, by the files beside the tokenizer.

    llama.cpp stops at three ids, eos, eot and eom, and at others that it knows by their text.
    """
    try:
        found = import_gguf().SpecialVocab(path.parent, n_vocab=vocab_size)
        template = found.chat_template or []
        choices = [{"name": "default", "template": template}] if isinstance(template, str) else template
        templates = {_NOT_A_NAME.sub("_", choice["name"]): str(choice["template"]) for choice in choices}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ExportError(f"{path.parent}: what goes with its tokenizer cannot be read by gguf ({exc!r})") from exc
    own = SpecialIds.of(path.parent)
    described = {"pad_token_id": end_of_text_id, **own.described(end_of_text_id)}
    special = found.special_token_ids | {key.removesuffix("_token_id"): value for key, value in described.items()}
    ends = dict.fromkeys([*own.ends, end_of_text_id])
    special |= dict(zip(("eot", "eom"), (end for end in ends if end != special["eos"]), strict=False))
    kept = {role: special[role] for role in ROLE_KEYS if special.get(role, vocab_size) < vocab_size}
    return kept, {role: bool(found.add_special_token.get(role)) for role in ADDED_ROLES}, templates


def _pre_tokenizer(found: dict[str, Any] | None) -> str | None:
    """llama.cpp's name of a pre-tokenizer, by the whole regular expression; None if it has none that is the same."""
    if found is None:
        return None
    steps = found.get("pretokenizers", []) if found["type"] == "Sequence" else [found]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    llama_3 = {"type": "Split", "pattern": {"Regex": _LLAMA_3}, "behavior": "Isolated", "invert": False}
    known = {
        "gpt-2": [_BYTE_LEVEL],
        "smollm": [_DIGITS, _BYTE_LEVEL],
        "llama-bpe": [llama_3, {**_BYTE_LEVEL, "use_regex": False}],
    }
    return next((name for name, expected in known.items() if steps == expected), None)


def _problems(content: dict[str, Any], vocab_size: int, vocab: dict[str, int], pre: str | None) -> list[str]:
    model, problems = content["model"], []
    if pre is None:
        problems.append(
            "pre_tokenizer: found one that is not known here; expected ByteLevel(add_prefix_space=false, "
            "use_regex=true), the same after Digits(individual_digits=true), or that of Llama 3"
        )
    if content.get("normalizer") is not None:
        problems.append(f"normalizer: found {content['normalizer'].get('type')}, expected none")
    for key, expected in _NOT_OURS.items():
        if model.get(key, expected) not in (expected, ""):
            problems.append(f"model.{key}: found {model[key]!r}, expected none")
    if bool(model.get("ignore_merges", False)) != (pre == "llama-bpe"):
        problems.append(f"model.ignore_merges: found {model.get('ignore_merges', False)}, expected the other")
    if max(vocab.values()) >= vocab_size:
        problems.append(f"vocabulary: found id {max(vocab.values())}, but the model knows {vocab_size} tokens")
    if len(set(vocab.values())) != len(vocab):
        problems.append("vocabulary: found two tokens of one id")
    odd = [one["content"] for one in content["added_tokens"] if one["lstrip"] or one["rstrip"] or one["single_word"]]
    if odd:
        problems.append(f"added_tokens: found {odd[0]!r}, which takes in neighbouring spaces or stands as a word alone")
    if not model["merges"] and not any(one["special"] for one in content["added_tokens"]):
        problems.append("found neither merges nor special tokens, expected one of them")
    return problems
