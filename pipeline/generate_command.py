"""The command `generate`; see pipeline.cli."""

import math
import sys
from pathlib import Path
from typing import Any

import click

from tristill.pipeline.config import DEFAULT_STUDENT
from tristill.pipeline.options import run_options, workspace_of
from tristill.stages.progress import say
from tristill.stages.visible import visible_lines

_SMALLEST_TEMPERATURE = 1e-3
_MOST_TOKENS = 1_000_000


def _temperature(_context: click.Context, _option: click.Parameter, value: float) -> float:
    if not math.isfinite(value) or value < 0 or 0 < value < _SMALLEST_TEMPERATURE:
        raise click.BadParameter(
            f"found {value:g}, expected 0, which takes the most likely token, or a number from "
            f"{_SMALLEST_TEMPERATURE:g} up"
        )
    return value


def _top_p(_context: click.Context, _option: click.Parameter, value: float) -> float:
    if not 0 < value <= 1:
        raise click.BadParameter(f"found {value:g}, expected more than 0 and at most 1, which is every token")
    return value


def _prompt(_context: click.Context, _option: click.Parameter, value: str) -> str:
    """The prompt, or all of stdin for `-`, to the byte: a newline at its end is one of the prompt."""
    try:
        if value == "-" and sys.stdin is None:
            raise click.BadParameter("found stdin closed, expected the prompt there")
        given = sys.stdin.buffer.read() if value == "-" else value.encode("utf-8", errors="surrogateescape")
        return given.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise click.BadParameter(f"found bytes that are not UTF-8 text ({exc.reason}); convert it") from exc


@click.command()
@click.argument("name", default=DEFAULT_STUDENT)
@click.option(
    "--prompt",
    default="",
    metavar="TEXT",
    callback=_prompt,
    help="What to go on from; `-` reads stdin; without it, nothing.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1, max=_MOST_TOKENS),
    show_default="100, or what the context has room for",
    help="New tokens at most.",
)
@click.option(
    "--temperature",
    type=float,
    callback=_temperature,
    default=1.0,
    show_default=True,
    help="0 takes the most likely token.",
)
@click.option(
    "--top-p", type=float, callback=_top_p, default=0.95, show_default=True, help="Share of probability to draw from."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws.")
@run_options
def generate(
    name: str,
    prompt: str,
    config_path: Path | None,
    assignments: tuple[str, ...],
    run_dir: Path | None,
    **sampling: Any,
) -> None:
    """Write text: by `teacher`, a student by name, or the model in a folder.

    Control characters other than the newline and the tab are shown as pictures or in angle brackets.

    \b
    Example:
        tristill generate --prompt 'def main(' --temperature 0 --max-tokens 40
    """
    from tristill.stages.generate.text import generate_text

    folder = workspace_of(config_path, assignments, run_dir).model_folder(name)

    def end(speed: str) -> None:
        click.echo()
        say(speed)

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: others read it
    for piece in generate_text(folder, prompt, **sampling, on_done=end):
        click.echo(visible_lines(piece), nl=False)
