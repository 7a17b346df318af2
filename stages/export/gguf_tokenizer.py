"""A `tokenizer.json` as llama.cpp reads one: byte-level BPE with a pre-tokenizer that llama.cpp knows by name."""

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from cache.regular_file import read_json_object
from stages.errors import ExportError, TokenizerError

_LARGEST_TOKENIZER_BYTES = 2**28
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NOT_OURS = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}


class TokenType(IntEnum):
    """What llama.cpp takes a token for."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class GgufTokenizer:
    """Token texts and types by id, and merges in order of rank."""

    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]


def gguf_tokenizer(path: Path, vocab_size: int) -> GgufTokenizer:
    """The tokenizer in `path`, with one token for each of the model's `vocab_size` ids.

    Raises ExportError, with all reasons, for a tokenizer that llama.cpp would take for another one.
    """
    try:
        content = read_json_object(path, _LARGEST_TOKENIZER_BYTES)
        model: dict[str, Any] = content["model"]
        vocab: dict[str, int] = {**model["vocab"], **{one["content"]: one["id"] for one in content["added_tokens"]}}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise TokenizerError(f"{path}: cannot be read as a tokenizer.json of a BPE ({exc!r})") from exc
    pre = _pre_tokenizer(content.get("pre_tokenizer"))
    if problems := [*_problems(content, vocab_size, vocab, pre)]:
        raise ExportError(
            f"{path}: llama.cpp would not make the same ids: {'; '.join(problems)}; use `--format hf`, or a tokenizer "
            "that `tristill tokenize` trains"
        )
    assert pre is not None, "that would be a problem"
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
    return GgufTokenizer(pre, tuple(tokens), tuple(types), tuple(merges))


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
    if model.get("type", "BPE") != "BPE":
        problems.append(f"model: found {model['type']}, expected BPE over bytes")
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
    if missing := [byte for byte in pre_tokenizers.ByteLevel.alphabet() if byte not in vocab]:
        problems.append(f"vocabulary: found no token for {len(missing)} of the 256 bytes")
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
