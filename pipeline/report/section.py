"""What the page is made of. All text is plain and is escaped where the page is written; only drawings are markup."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Heading:
    """The title of what follows, within a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Missing:
    """What is not there, and the command that makes it."""

    kind: ClassVar[str] = "missing"
    text: str


@dataclass(frozen=True)
class Entry:
    """A line of a legend: a colour by its role and whether the line is dashed."""

    label: str
    color: str
    is_dashed: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot. key: unique on the page. svg: markup, made by pipeline.report.drawing. caption: how to read it."""

    kind: ClassVar[str] = "figure"
    key: str
    title: str
    svg: str
    caption: str
    legend: Sequence[Entry] = ()
    is_wide: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells as text; the first `num_left` columns are words, the others numbers.

    With a title it is small, and stands among the figures.
    """

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    num_left: int = 1
    title: str = ""


@dataclass(frozen=True)
class Continuation:
    """What one model wrote."""

    model: str
    color: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A piece of held-out text, and how each model goes on from it."""

    kind: ClassVar[str] = "prompt"
    text: str
    continuations: Sequence[Continuation]


@dataclass(frozen=True)
class Listing:
    """Preformatted text."""

    kind: ClassVar[str] = "listing"
    text: str


Block = Text | Heading | Missing | Figure | Table | Prompt | Listing


@dataclass(frozen=True)
class Section:
    """A chapter of the page. key: its anchor."""

    key: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)

    @property
    def figures(self) -> list[Figure]:
        """Every plot in it."""
        return [block for block in self.blocks if isinstance(block, Figure)]


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page: what it is, the number, and what to hold it against."""

    label: str
    value: str
    note: str
