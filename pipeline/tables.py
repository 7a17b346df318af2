"""Tables on a terminal: those that are wider than it are cut into several, and their long cells are wrapped.

What is piped stays as it is: Markdown of full width, one line a row.
"""

import io
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

import click

from tristill.pipeline.terminal import cells

_BETWEEN_CELLS = re.compile(r" (?<!\\)\| ")
_SENTENCE = 28
"""A column of cells longer than this holds words, which may be wrapped."""

_NAME = 8
"""A first column is cut to this, if nothing else helps."""


def echo_tables(text: str) -> None:
    """Print text with tables in Markdown."""
    click.echo(fitted(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text)


def fitted(text: str, columns: int) -> str:
    """The text with every table that is wider than so many columns laid out anew."""
    parts = []
    for is_table, found in groupby(text.split("\n"), key=lambda line: line.startswith(("| ", "|-"))):
        lines = list(found)
        if is_table and cells(lines[0]) > columns:
            rows = [_BETWEEN_CELLS.split(line[2:-2]) for line in lines if not line.startswith("|-")]
            if len({len(row) for row in rows}) == 1:
                lines = list(_narrowed([[cell.strip() for cell in row] for row in rows], columns))
        parts += lines
    return "\n".join(parts)


def _narrowed(rows: Sequence[Sequence[str]], columns: int) -> Iterator[str]:
    """Tables below one another that share the first column."""
    natural = [max(cells(row[i]) for row in rows) for i in range(len(rows[0]))]
    least = [_least_width([row[i] for row in rows]) for i in range(len(rows[0]))]
    blocks: list[list[int]] = [[]]
    for column in range(1, len(natural)):
        if blocks[-1] and _table_width([least[i] for i in (0, *blocks[-1], column)]) > columns:
            blocks.append([])
        blocks[-1].append(column)
    for number, block in enumerate(blocks):
        shown = [0, *block]
        widths = [least[i] for i in shown]
        widths[0] = max(_NAME, widths[0] - max(0, _table_width(widths) - columns))
        for place, column in enumerate(shown):  # what is left goes to those that would be wrapped, from the left
            room = columns - _table_width(widths)
            widths[place] += max(0, min(room, natural[column] - widths[place]))
        yield from [""] if number else []
        yield from _rendered([[row[i] for i in shown] for row in rows], widths, columns)


def _table_width(widths: Sequence[int]) -> int:
    return sum(widths) + 3 * len(widths) + 1


def _least_width(column: Sequence[str]) -> int:
    """Of a header wrapped at its spaces, over cells that are not, unless they are sentences."""
    header, *body = column
    words = max((cells(word) for word in header.split()), default=1)
    longest = max((cells(cell) for cell in body), default=1)
    return max(words, longest if longest <= _SENTENCE else min(_SENTENCE, longest))


def _rendered(rows: Sequence[Sequence[str]], widths: Sequence[int], columns: int) -> list[str]:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.MARKDOWN)
    for title, width in zip(rows[0], widths, strict=True):
        table.add_column(Text(title), width=width, overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    file = io.StringIO()
    Console(file=file, width=max(columns, _table_width(widths)), color_system=None).print(table)
    return [line for line in file.getvalue().split("\n") if line.strip()]
