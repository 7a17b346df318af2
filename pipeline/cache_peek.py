"""A window of a cache for people: its text, coloured by how sure the teacher was, and a table of some positions."""

import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tristill.cache import Cache, CacheSpec, SplitName, open_cache
from tristill.cache.peek import PeekedPosition, PeekedWindow, peek
from tristill.cache.profiles.sampled import SampledProfile
from tristill.pipeline.results import text_table
from tristill.pipeline.terminal import Colour, Span, cells, painted, wrapped
from tristill.stages.visible import visible

_HEADER = ("position", "input", "label", "entropy, nats", "p(label)")
_NEWLINE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"
_NOT_COUNTED = "does not count"
"""Of a position where no loss is, in place of what the teacher expected: the label is not the assistant's."""
_BLACK = 16
# From surprise to certainty, red over pale yellow to blue, which people who see no green tell apart too. Each with the
# least probability that it stands for, as text and as a number.
SCALE = (
    ("0", 0.0, Colour(_BLACK, 203)),
    ("0.001", 0.001, Colour(_BLACK, 209)),
    ("0.01", 0.01, Colour(_BLACK, 215)),
    ("0.1", 0.1, Colour(_BLACK, 229)),
    ("0.3", 0.3, Colour(_BLACK, 195)),
    ("0.6", 0.6, Colour(_BLACK, 153)),
    ("0.9", 0.9, Colour(_BLACK, 111)),
)


def peek_text(
    folder: Path, split: SplitName, windows: range, positions: range, num_top: int, *, is_coloured: bool
) -> Iterator[str]:
    """For every window its text, and of some positions what the teacher thought of the label and what it expected."""
    cache = open_cache(folder)
    try:
        for window in windows:
            yield _window_text(cache, split, window, peek(cache, split, window, positions, num_top), is_coloured)
    finally:
        cache.close()


def colour_of(probability: float) -> Colour:
    """The colour that stands for a probability."""
    return next(colour for _, least, colour in reversed(SCALE) if probability >= least)


def legend() -> str:
    """The scale in its own colours."""
    names = [name for name, _, _ in SCALE]
    texts = [f" {low} to {high} " for low, high in zip(names, [*names[1:], "1"], strict=True)]
    spans = zip(texts, (colour for _, _, colour in SCALE), strict=True)
    return "the teacher's probability of each token: " + "".join(painted(span) for span in spans) + ", none: not known"


def coloured_text(tokenizer_json: Path, window: PeekedWindow) -> Iterator[Span]:
    """The text of a window, each character in the colour of its tokens' probability.

    A character of several tokens has the product of theirs, which is its own (the chain rule), and no colour where one
    of them is not known, as that of the first token of a window never is.
    """
    from tristill.stages.data.token_text import text_pieces

    probabilities = [None, *window.label_probabilities]
    first = 0
    for num_tokens, text in text_pieces(tokenizer_json, window.ids):
        known = [p for p in probabilities[first : first + num_tokens] if p is not None]
        first += num_tokens
        lines = text.split("\n")
        shown = _NEWLINE.join(visible(line) for line in lines)
        yield shown, colour_of(math.prod(known)) if len(known) == num_tokens else None


def _window_text(cache: Cache, split: SplitName, number: int, window: PeekedWindow, is_coloured: bool) -> str:
    temperature = cache.spec.profile.temperature
    title = f"{split}, window {number:,} of {cache.num_windows(split):,}, at temperature {temperature:g}"
    has_colours = is_coloured and any(p is not None for p in window.label_probabilities)
    columns = shutil.get_terminal_size().columns
    lines = wrapped(coloured_text(cache.tokenizer_path, window), columns)
    fitted = columns if sys.stdout.isatty() else None
    text = "\n".join("".join(painted(span) if has_colours else span[0] for span in line) for line in lines)
    parts = [
        title,
        *[legend()] * has_colours,
        text,
        *([_table(cache, window.positions, fitted)] if window.positions else []),
    ]
    return "\n\n".join(parts)


def _table(cache: Cache, positions: Sequence[PeekedPosition], columns: int | None) -> str:
    """One row a position; if a terminal has so many columns, with no more entries than its rows have room for."""
    from tristill.stages.data.token_text import token_texts

    ids = {token_id for seen in positions for token_id in (seen.input_id, seen.label_id, *(i for i, _ in seen.top))}
    texts = {token_id: _in_a_cell(text) for token_id, text in token_texts(cache.tokenizer_path, ids).items()}
    lines = [list(_HEADER), *(_row(seen, texts) for seen in positions)]
    room = math.inf if columns is None else columns - cells(text_table(lines).partition("\n")[0]) - len("  |")
    entries = [[f"{texts[token_id]} {probability:.3f}" for token_id, probability in seen.top] for seen in positions]
    nothing = _NOT_COUNTED if cache.spec.is_masked else "-"
    lasts = [_title(cache.spec), *(_fitting(found, room) or nothing for found in entries)]
    return text_table([[*line, last] for line, last in zip(lines, lasts, strict=True)])


def _title(spec: CacheSpec) -> str:
    if isinstance(spec.profile, SampledProfile):
        return f"share of {spec.profile.draws} draws"
    return "the teacher's largest"


def _row(seen: PeekedPosition, texts: dict[int, str]) -> list[str]:
    entropy = "-" if seen.entropy_nats is None else f"{seen.entropy_nats:.2f}"
    label = "-" if seen.label_probability is None else f"{seen.label_probability:.2g}"
    return [str(seen.position), texts[seen.input_id], texts[seen.label_id], entropy, label]


def _fitting(entries: Sequence[str], room: float) -> str:
    """As many entries as `room` columns hold, but one at least if there is one."""
    count = len(entries)
    while count > 1 and cells(", ".join(entries[:count])) > room:
        count -= 1
    return ", ".join(entries[:count])


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|")
