"""Text for a terminal: its width in cells, lines of coloured spans, and whether colours are wanted."""

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import click
from wcwidth import iter_graphemes, width


@dataclass(frozen=True, slots=True)
class Colour:
    """A foreground on a background, of xterm's 256: both are set, so it reads alike on dark and light terminals."""

    foreground: int
    background: int


Span = tuple[str, Colour | None]
"""A piece of text of one colour; it holds no control character but the newline."""


def wants_colour(asked: bool | None) -> bool:
    """What was asked for; else whether stdout is a terminal that shows colours and NO_COLOR (no-color.org) is unset."""
    if asked is not None:
        return asked
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(span: Span) -> str:
    """The text between escape sequences, if it has a colour."""
    text, colour = span
    return text if colour is None else click.style(text, fg=colour.foreground, bg=colour.background)


def cells(text: str) -> int:
    """How many columns a terminal takes for it."""
    return width(text, control_codes="ignore")


def wrapped(spans: Iterable[Span], columns: int) -> Iterator[list[Span]]:
    """Lines of spans, ended by newlines, which are dropped, or when the next character would pass the last column."""
    line: list[Span] = []
    used = 0
    for text, colour in spans:
        run = ""
        for character in iter_graphemes(text):
            taken = cells(character)
            if character == "\n" or used + taken > columns:
                yield [*line, (run, colour)] if run else line
                line, run, used = [], "", 0
            if character != "\n":
                run, used = run + character, used + taken
        if run:
            line.append((run, colour))
    if line:
        yield line
