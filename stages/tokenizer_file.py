"""A `tokenizer.json` that others may have written: read up to a bound, and refused if it may lengthen a text too much.

A few lines of replacements that double a text can ask for more memory than any machine has.
"""

import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tristill.cache.regular_file import parsed_json, read_file
from tristill.stages.errors import TokenizerError

LARGEST_TOKENIZER_BYTES = 2**28
LARGEST_GROWTH = 1000.0
_FOLDED = 4.0
"""Characters that one of no rule's may become: the bytes of one, or its parts (18 at most, in one that is rare)."""


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, without the truncation and padding that may be stored there.

    Raises TokenizerError if there is none, or one that may lengthen a text beyond reason.
    """
    try:
        content = read_file(path, LARGEST_TOKENIZER_BYTES)
        if growth(parsed_json(content)) > LARGEST_GROWTH:
            raise ValueError(f"its rules may lengthen a text by more than {LARGEST_GROWTH:,.0f} times")  # noqa: TRY301
        with panics_named(path):
            tokenizer = Tokenizer.from_buffer(content)
    except TokenizerError:
        raise
    except Exception as exc:  # tokenizers raises bare Exception
        raise TokenizerError(f"{path}: cannot be read as a tokenizer.json ({exc})") from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextmanager
def panics_named(path: Path) -> Iterator[None]:
    """Panics of the library, which are no Exception, become TokenizerError, as of expressions that take too long."""
    try:
        yield
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":  # of a module that cannot be imported
            raise
        raise TokenizerError(
            f"{path}: tokenizers fails with it ({exc}); use a tokenizer.json without the rule that it fails on"
        ) from exc


@dataclass
class _Lengths:
    """What one character comes to by all that follows. Characters that no rule names are alike."""

    known: dict[str, float] = field(default_factory=dict)
    others: float = 1.0

    def of(self, text: str) -> float:
        return sum(self.known.get(character, self.others) for character in text)

    def largest(self) -> float:
        return max([self.others, *self.known.values()])

    def grow(self, factor: float) -> None:
        """Any character may become so many of any."""
        self.known, self.others = {}, factor * self.largest()


def growth(tokenizer: Any) -> float:
    """An upper bound of characters out by characters in, for the content of a `tokenizer.json`; infinity beyond reason.

    By the potential method, from the last rule to the first: a text weighs the sum of its characters' weights, which
    are chosen such that no rule makes it heavier, and at the end each weighs one. A replacement of p by c gives each
    character of p at least the weight of c over the length of p; a regular expression, which may match nothing at every
    place, adds that of c to all. (Amortised: Tarjan 1985, Amortized Computational Complexity.)
    """
    try:
        encoding = [*_parts(tokenizer.get("normalizer")), *_parts(tokenizer.get("pre_tokenizer"))]
        return max(_growth(encoding), _growth(list(_parts(tokenizer.get("decoder")))))
    except (TypeError, AttributeError, KeyError):
        return 1.0  # no such file: the library refuses it, and says why


def _growth(parts: list[Mapping[str, Any]]) -> float:
    lengths = _Lengths()
    for part in reversed(parts):
        _before(part, lengths)
        if lengths.largest() > LARGEST_GROWTH:
            return math.inf
    return lengths.largest()


def _before(part: Mapping[str, Any], lengths: _Lengths) -> None:
    """Turn the lengths after this part of a tokenizer into those before it."""
    match part["type"]:
        case "Replace":
            _before_replacement(part["pattern"], str(part["content"]), lengths)
        case "NFC" | "NFD" | "NFKC" | "NFKD" as form:
            _before_change(lambda character: unicodedata.normalize(form, character), _FOLDED, lengths)
        case "Lowercase":
            _before_change(str.lower, 2.0, lengths)
        case "BertNormalizer" | "ByteLevel" | "Precompiled" | "Nmt":
            lengths.grow(_FOLDED)
        case "Metaspace":
            lengths.grow(2.0)  # a mark before each piece


def _before_replacement(pattern: Mapping[str, str], content: str, lengths: _Lengths) -> None:
    weight = lengths.of(content)
    if text := pattern.get("String"):
        for character in text:
            lengths.known[character] = max(lengths.of(character), weight / len(text))
    else:
        lengths.known = {character: length + weight for character, length in lengths.known.items()}
        lengths.others += weight


def _before_change(change: Callable[[str], str], most: float, lengths: _Lengths) -> None:
    """Of every character by itself; most: characters that one of no rule's becomes."""
    known = {character: max(length, lengths.of(change(character))) for character, length in lengths.known.items()}
    lengths.known, lengths.others = known, max(most * lengths.others, lengths.largest())


def _parts(part: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of a sequence, in their order, however it is nested."""
    if part is None:
        return
    nested = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders")
    if nested is None:
        yield part
    else:
        for inner in nested:
            yield from _parts(inner)
