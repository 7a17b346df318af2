"""Plots as SVG that stands in the page, by matplotlib.

Colours are drawn as those of the light page and then replaced by the page's variables, so that one drawing serves light
and dark. Widths are in CSS pixels at full size; text is 12 of them.
"""

import io
import re
import xml.etree.ElementTree as ET  # reads what matplotlib has just written
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tristill.pipeline.report.section import Entry
from tristill.pipeline.units import scale_of, tick_text
from tristill.stages.visible import visible, visible_lines, visible_markup

Axes = Any
"""matplotlib's, which is imported only when something is drawn."""

NARROW, WIDE = 360, 760
MAX_POINTS = 300

# After Okabe and Ito 2008, Color Universal Design, darkened to a contrast of at least 3 on white; the page has the dark
# variants (page.html). The teacher is drawn in ink.
COLORS = {
    "ink": "#1b2430",
    "muted": "#59636f",
    "grid": "#dde2e8",
    "surface": "#ffffff",
    "s1": "#0069b4",
    "s2": "#cf4a00",
    "s3": "#00835f",
    "s4": "#b04f8d",
    "s5": "#a06f00",
    "s6": "#2b95c9",
    "s7": "#6b5bc4",
    "s8": "#7a6a55",
}
SERIES = tuple(role for role in COLORS if role[0] == "s" and role[1].isdigit())
_ROLES = {color: role for role, color in COLORS.items()}
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": COLORS["muted"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": COLORS["ink"],
    "axes.labelsize": 12,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 12,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 1,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "patch.linewidth": 0,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": COLORS["ink"],
    "text.parse_math": False,
    "xtick.color": COLORS["muted"],
    "xtick.labelsize": 12,
    "ytick.color": COLORS["muted"],
    "ytick.labelsize": 12,
}
_SVG = "http://www.w3.org/2000/svg"
_LINK = "http://www.w3.org/1999/xlink"
_COLOR = re.compile(r"#[0-9a-f]{6}")
_FONT = re.compile(r"font[a-z-]*:[^;]*;? *")


@dataclass(frozen=True)
class Line:
    """A curve with its place in the legend. band: (lower, upper) values around it."""

    entry: Entry
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    has_markers: bool = False


def drawn(plot: Callable[[Axes], object], key: str, height: int = 250, width: int = NARROW) -> str:
    """SVG of what `plot` draws on empty axes. key: unique on the page; it is in the ids of the drawing."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    with style.context(["default", _STYLE | {"svg.hashsalt": key}]):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        plot(figure.subplots())
        for text in figure.findobj(Text):
            if (shown := visible_lines(text.get_text())) != text.get_text():  # in words that the font has
                text.set_text(shown.encode("ascii", "backslashreplace").decode())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inlined(visible_markup(file.getvalue()), key)  # XML has no control characters at all


def lines(
    found: Sequence[Line],
    key: str,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    has_shares: bool = False,
    has_whole_x: bool = False,
) -> str:
    """Curves over one axis. has_shares: values are shown in per cent; has_whole_x: ticks are whole numbers."""

    def plot(axes: Axes) -> None:
        for line in found:
            color = COLORS[line.entry.color]
            style = (0, (4, 2)) if line.entry.is_dashed else "-"
            at = thinned(len(line.x))
            x, y = [line.x[i] for i in at], [line.y[i] for i in at]
            if line.band is not None:
                low, high = ([edge[i] for i in at] for edge in line.band)
                axes.fill_between(x, low, high, color=color, alpha=0.15)
            axes.plot(x, y, color=color, linestyle=style, marker="o" if line.has_markers or len(x) == 1 else "")
        scale_axes(axes, log_x=log_x, log_y=log_y)
        if has_shares:
            shares_on(axes.yaxis)
        if has_whole_x:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return drawn(plot, key)


def bars(
    labels: Sequence[str], values: Sequence[float], texts: Sequence[str], key: str, x_label: str, color: str = "s1"
) -> str:
    """Horizontal bars, from the top down, with a text at the end of each."""

    def plot(axes: Axes) -> None:
        places = range(len(labels))
        axes.barh(places, values, color=COLORS[color], height=0.62)
        for place, value, text in zip(places, values, texts, strict=True):
            axes.annotate(text, (value, place), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_yticks(places, [plain(label) for label in labels])
        axes.invert_yaxis()
        axes.set_xlim(0, max(values, default=0) * 1.3 or 1)
        axes.set_xlabel(x_label)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        numbers_on(axes.xaxis)

    return drawn(plot, key, height=70 + 26 * len(labels))


def histogram(edges: Sequence[float], counts: Sequence[int], key: str, x_label: str, y_label: str) -> str:
    """Shares of positions between neighbouring edges."""

    def plot(axes: Axes) -> None:
        total = sum(counts) or 1
        widths = [high - low for low, high in pairwise(edges)]
        shares = [count / total for count in counts]
        axes.bar(edges[:-1], shares, widths, align="edge", color=COLORS["s1"], edgecolor=COLORS["surface"], linewidth=1)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(visible=False, axis="x")
        shares_on(axes.yaxis)
        numbers_on(axes.xaxis)

    return drawn(plot, key)


def entries_of(labels: Sequence[str]) -> list[Entry]:
    """A place in the legend for each, by colour; dashed from the fifth on, for those who see few colours."""
    return [Entry(label, SERIES[i % len(SERIES)], i % len(SERIES) >= 4) for i, label in enumerate(labels)]


def over_positions(positions: Sequence[float], largest: float) -> list[float]:
    """Positions in the unit that `positions_label` names."""
    return [count / scale_of(largest)[0] for count in positions]


def positions_label(largest: float) -> str:
    """The label of an axis of training positions up to `largest`."""
    return f"{scale_of(largest)[1]} positions trained on".strip()


def scale_axes(axes: Axes, *, log_x: bool = False, log_y: bool = False) -> None:
    """Linear or logarithmic, with plain numbers either way."""
    for axis, is_log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        if is_log:
            _log_scale(axes, axis)
        numbers_on(axis)


def numbers_on(axis: Any) -> None:
    """Plain numbers at the ticks."""
    axis.set_major_formatter(lambda value, _: tick_text(value))


def shares_on(axis: Any) -> None:
    """Per cent at the ticks."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")


def _log_scale(axes: Axes, axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    is_x = axis is axes.xaxis
    low, high = sorted((axes.dataLim.minposx if is_x else axes.dataLim.minposy, axes.dataLim.max[0 if is_x else 1]))
    (axes.set_xscale if is_x else axes.set_yscale)("log")
    steps = (1, 2, 5) if high / max(low, 1e-300) < 200 else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_formatter(NullFormatter())


def thinned(count: int) -> list[int]:
    """Indices of at most MAX_POINTS points, evenly, the last one among them."""
    stride = -(-count // MAX_POINTS) or 1
    return sorted({*range(0, count, stride), *([count - 1] if count else [])})


def plain(text: str, longest: int = 26) -> str:
    """Text for within a plot, whose font knows ASCII for sure; cut in its middle if it is long."""
    text = visible(text).encode("ascii", "backslashreplace").decode()
    half = longest // 2 - 1
    return text if len(text) <= longest else f"{text[:half]}..{text[-half:]}"


def _inlined(svg: str, key: str) -> str:
    """A drawing that stands in a page: ids of its own, colours of the page, as wide as there is room."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _LINK)
    root = ET.fromstring(svg)  # noqa: S314 - matplotlib's
    for parent in root.iter():
        for child in list(parent):
            child.tail = None  # line breaks
            if child.tag in {f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"}:
                parent.remove(child)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', ET.tostring(root, encoding="unicode")))
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name == "id":
                del element.attrib[name]
                if value in used:
                    element.set("id", f"{key}-{value}")
            elif name == f"{{{_LINK}}}href":
                element.set(name, value.replace("#", f"#{key}-", 1))
            elif name == "clip-path":
                element.set(name, value.replace("url(#", f"url(#{key}-"))
            elif name == "style":
                element.set(name, _styled(value))
    for name in ("version", "width", "height"):
        root.attrib.pop(name, None)
    return ET.tostring(root, encoding="unicode")


def _styled(style: str) -> str:
    """Colours by role; the font is the page's."""
    return _COLOR.sub(lambda found: f"var(--{_ROLES[found[0]]})", _FONT.sub("", style))
