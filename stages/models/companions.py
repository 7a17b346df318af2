"""Files that go with a tokenizer wherever it goes: its special tokens, its chat template, when and how to generate.

They are data: what names Python code is left out, and a chat template is run by whoever renders it, in a sandbox.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tristill.cache.atomic import write_atomically
from tristill.cache.layout import COMPANION_NAMES, LARGEST_COMPANION_BYTES, CompanionName
from tristill.cache.regular_file import read_json_object
from tristill.stages.errors import TokenizerError
from tristill.stages.models.description import CONFIG_NAME, TOKENIZER_NAME

_LARGEST_TOKENIZER_BYTES = 2**28
_SAYS_NOTHING = {"tokenizer_class", "model_max_length"}
"""Keys of the tokenizer_config.json that is written where nothing is known of special tokens."""
_TEMPLATE: CompanionName = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
_ROLES = ("bos", "eos", "pad")
TokenizerConfig = dict[str, Any]


def companions(folder: Path) -> dict[CompanionName, bytes]:
    """The files beside the tokenizer in a model's folder, byte for byte, as far as they are there and say anything.

    Several chat templates are put together in tokenizer_config.json, one stands alone; `auto_map`, which names code, is
    left out. Where only config.json says which ids begin, end and pad, generation_config.json is made of that. Raises
    TokenizerError for one that cannot be read.
    """
    found = {name: content for name in COMPANION_NAMES if (content := _content(folder / name)) is not None}
    config = _json(folder / "tokenizer_config.json", found.get("tokenizer_config.json"))
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    templates = {path.stem: _content(path) or b"" for path in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))}
    if templates:
        default = {"default": found.pop(_TEMPLATE)} if _TEMPLATE in found else {}
        kept["chat_template"] = [
            {"name": name, "template": text.decode("utf-8", "replace")}
            for name, text in {**default, **templates}.items()
        ]
    elif _TEMPLATE in found:
        kept.pop("chat_template", None)  # else transformers takes the one and llama.cpp the other
    if kept.keys() <= _SAYS_NOTHING:
        found.pop("tokenizer_config.json", None)
    elif kept != config:
        found["tokenizer_config.json"] = as_json(kept)
    if "generation_config.json" not in found and (ids := _ids_of_config(folder / CONFIG_NAME)):
        found["generation_config.json"] = as_json(ids)
    return found


def write_tokenizer(tokenizer_json: Path, folder: Path, beside: Path | None = None) -> None:
    """Write a tokenizer and what goes with it into a folder; those it does not have are taken from `beside`, a folder.

    A tokenizer that lies in that folder already stays as it is.
    """
    if tokenizer_json.resolve() == (folder / TOKENIZER_NAME).resolve():
        return
    found = {**(companions(beside) if beside else {}), **companions(tokenizer_json.parent)}
    write_atomically(folder / TOKENIZER_NAME, tokenizer_json.read_bytes())
    for name in COMPANION_NAMES:
        if name in found:
            write_atomically(folder / name, found[name])
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier model of this folder


@dataclass(frozen=True)
class SpecialIds:
    """Ids by role, None where nothing says which; ends: all that end a text when it is generated."""

    bos: int | None
    eos: int | None
    pad: int | None
    ends: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path) -> "SpecialIds":
        """As the files beside the tokenizer in a folder say: tokenizer_config.json first, generation_config.json last.

        Raises TokenizerError for one that cannot be read.
        """
        named = {
            role: text
            for name in ("special_tokens_map.json", "tokenizer_config.json")
            for role, text in _named_tokens(_json(folder / name, _content(folder / name)))
        }
        generation = _json(folder / "generation_config.json", _content(folder / "generation_config.json"))
        ids = _ids_of_tokens(folder / TOKENIZER_NAME, named) if named else {}
        ends = _as_ids(generation.get("eos_token_id"))
        first = {role: next(iter(_as_ids(generation.get(f"{role}_token_id"))), None) for role in _ROLES}
        found = {role: ids.get(role, first[role]) for role in _ROLES}
        eos = found["eos"]
        return cls(found["bos"], eos, found["pad"], tuple(dict.fromkeys([*ends, *([] if eos is None else [eos])])))

    def described(self, end_of_text_id: int) -> dict[str, int]:
        """`bos_token_id` and so on of a description, of a model whose texts are separated by that id."""
        pad = {} if self.pad is None else {"pad_token_id": self.pad}
        return {
            "bos_token_id": end_of_text_id if self.bos is None else self.bos,
            "eos_token_id": end_of_text_id if self.eos is None else self.eos,
            **pad,
        }


def generation_config(folder: Path, end_of_text_id: int) -> bytes | None:
    """generation_config.json of a model trained with the tokenizer in a folder; None if nothing says how to generate.

    It ends at all that the tokenizer's own ends at, and at the id that separates its texts.
    """
    ids = SpecialIds.of(folder)
    path = folder / "generation_config.json"
    found = _json(path, _content(path))
    if not found and ids == SpecialIds(None, None, None, ()):
        return None
    ends = list(dict.fromkeys([*ids.ends, end_of_text_id]))
    is_derived = found.pop("_from_model_config", False)  # transformers would make it anew from config.json
    if set(_as_ids(found.get("eos_token_id"))) == set(ends) and not is_derived:
        return path.read_bytes()
    own = {key: value for key, value in ids.described(end_of_text_id).items() if key not in found}
    return as_json({**found, **own, "eos_token_id": ends if len(ends) > 1 else ends[0]})


def as_json(value: Mapping[str, Any]) -> bytes:
    """An object as these files hold it."""
    return (json.dumps(value, indent=2) + "\n").encode("utf-8")


def _content(path: Path) -> bytes | None:
    """The bytes of a file; links are followed, as hubs keep files behind such. None if there is none."""
    try:
        if not path.is_file():
            return None
        if (size := path.stat().st_size) > LARGEST_COMPANION_BYTES:
            raise TokenizerError(f"{path}: found {size} bytes, expected at most {LARGEST_COMPANION_BYTES}")
        return path.read_bytes()
    except OSError as exc:
        raise TokenizerError(f"{path}: cannot be read ({exc.strerror or exc}); fix or remove it") from exc


def _json(path: Path, content: bytes | None) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        return read_json_object(path, LARGEST_COMPANION_BYTES)
    except (OSError, ValueError) as exc:
        raise TokenizerError(f"{path}: cannot be read as a JSON object ({exc}); fix or remove it") from exc


def _named_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for role in _ROLES:
        token = config.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            yield role, text


def _ids_of_tokens(tokenizer_json: Path, named: Mapping[str, str]) -> dict[str, int]:
    """The ids of tokens by role, of those that the tokenizer has."""
    try:
        content = read_json_object(tokenizer_json, _LARGEST_TOKENIZER_BYTES)
        added = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or ()}
        vocab = content["model"].get("vocab")
        texts = vocab if isinstance(vocab, dict) else {text: n for n, (text, *_) in enumerate(vocab or ())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise TokenizerError(f"{tokenizer_json}: cannot be read as a tokenizer.json ({exc!r})") from exc
    texts = {**texts, **added}
    return {role: texts[text] for role, text in named.items() if isinstance(texts.get(text), int)}


def _as_ids(value: object) -> list[int]:
    """Of an id, or a list of them."""
    ids = value if isinstance(value, list) else [value]
    return [token_id for token_id in ids if isinstance(token_id, int) and not isinstance(token_id, bool)]


def _ids_of_config(path: Path) -> dict[str, Any]:
    """The ids that the description of a model of transformers names."""
    config = _json(path, _content(path))
    if "transformers_version" not in config:
        return {}
    inner = config.get("text_config")
    config = {**(inner if isinstance(inner, dict) else {}), **config}
    return {key: config[key] for role in _ROLES if config.get(key := f"{role}_token_id") is not None}
