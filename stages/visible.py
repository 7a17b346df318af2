"""Text as it reaches a terminal: nothing that others wrote moves the cursor, hides text or forges a line of ours."""

import os
import re
import sys
import unicodedata
from html import escape
from pathlib import Path
from typing import Any, TextIO

_CONTROL_PICTURES = 0x2400
_DELETE, _PICTURE_OF_DELETE = 0x7F, "\N{SYMBOL FOR DELETE}"
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
_LAYOUT = re.compile(r"((?:\r?\n)+|\t)")
_MOVES = re.compile(r"\n*(?:\x1b\[A)*")
"""Written by itself by a progress bar: lines down, and up again."""
_NEXT_LINE = re.compile(r"\n(?!\n|  |\Z)")


def visible(text: str) -> str:
    """The text on one line, with everything that is not a printable character or a space in a form that is.

    Control characters as their pictures, U+2400 and on; others, such as marks of direction, as <U+202E>.
    """
    return text if str.isprintable(text) else "".join(map(_visible_character, text))


def visible_lines(text: str) -> str:
    """As `visible`, with the ends of lines and tabs as they are."""
    return "".join(part if i % 2 else visible(part) for i, part in enumerate(_LAYOUT.split(text)))


def visible_markup(markup: str) -> str:
    """As `visible_lines`, in HTML or XML: the forms of characters are text there, and no tags."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else escape(_visible_character(character))
        for character in markup
    )


class Painted(str):
    """Text of ours with escape sequences of ours; whatever else is in it has been made visible."""

    __slots__ = ()


def guard_output() -> None:
    """From now on everything that is printed, whoever prints it, is visible text.

    Lines of one message after its first are indented on stderr, so that no text within it looks like another message,
    and what may be a credential is masked there.
    A log that cannot be written, on a full disk or a closed terminal, ends nothing; a result that cannot be written is
    an OSError, raised once.
    """
    sys.stdout, sys.stderr = _guarded(sys.stdout, is_log=False), _guarded(sys.stderr, is_log=True)


def open_closed_descriptors() -> None:
    """Give stdin, stdout and stderr the null device where they are closed: else the next file opened would be one."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)  # takes the lowest that is free


def _guarded(stream: TextIO | None, *, is_log: bool) -> Any:
    if isinstance(stream, _VisibleStream):
        return stream
    return _VisibleStream(Path(os.devnull).open("w", encoding="utf-8") if stream is None else stream, is_log=is_log)


class _VisibleStream:
    """A text stream in front of another. It has no `buffer`, by which bytes would pass."""

    def __init__(self, stream: TextIO, *, is_log: bool) -> None:
        self._stream = stream
        self._is_log = is_log
        self._has_failed = False

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be seen of the text; returns how long the text was."""
        shown = text if isinstance(text, Painted) else self._shown(text)
        encoding = self._stream.encoding or "utf-8"
        if shown:  # click writes nothing to see whether it may, and takes no notice of errors
            self._do("write", shown.encode(encoding, errors="backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        self._do("flush")

    def _shown(self, text: str) -> str:
        if not self._is_log:
            return visible_lines(text)
        if _MOVES.fullmatch(text):
            return text
        from tristill.cache.secrets import masked  # with numpy, after signals are handled

        text = masked(text)
        start = "\r" * text.startswith("\r")  # of a progress bar
        return start + _NEXT_LINE.sub("\n  ", visible_lines(text[len(start) :]))

    def _do(self, method: str, *arguments: str) -> None:
        if self._has_failed and not self._is_log:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except (OSError, ValueError):  # ValueError: it was closed
            self._has_failed = True
            if not self._is_log:
                raise


def _visible_character(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(_CONTROL_PICTURES + code)
    if code == _DELETE:
        return _PICTURE_OF_DELETE
    if character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs":
        return character
    return f"<U+{code:04X}>"
