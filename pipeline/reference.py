"""Writes the documents that are made from the program itself: docs/cli.md, docs/config.md and the marked tables of all.

    python -m tristill.pipeline.reference            (`make docs`)

A test fails when what is on disk is not what this would write.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
from pydantic import BaseModel

from tristill.cache.atomic import write_atomically
from tristill.pipeline.cli import cli
from tristill.pipeline.config import Config, kind_of, section_types
from tristill.pipeline.config_fields import default_text, type_name
from tristill.pipeline.sweep.config import Range, SweepConfig
from tristill.stages.settings import affects_numbers

_CONFIG_INTRODUCTION = """# Config

Made from the program by `make docs`. A config is a TOML file; `--set dotted.key=value` changes one setting. Settings
marked with * change no number: they may differ without making anything stale.
"""
_SWEEP_INTRODUCTION = """# Sweeps

Likewise, the settings of what `tristill sweep` reads; see [sweeps.md](sweeps.md).
"""
ROOT = Path(__file__).resolve().parent.parent
_MARKED = re.compile(r"<!-- table: (?P<name>\w+)(?P<part>\.\w+)? -->\n.*?<!-- end -->", re.DOTALL)


def documents() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    pages = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
    return {
        **{page: with_tables(text) for page, text in pages.items() if _MARKED.search(text)},
        ROOT / "docs" / "cli.md": cli_reference(),
        ROOT / "docs" / "config.md": config_reference(),
    }


def cli_reference() -> str:
    """Help of every command, as the program prints it."""
    parts = ["# Command line\n\nMade from the program by `make docs`.\n"]
    parts += [f"## {name}\n\n```\n{text}\n```\n" for name, text in _help_texts(cli, None, "tristill")]
    return "\n".join(parts)


def _help_texts(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, str]]:
    context = click.Context(command, info_name=name, parent=parent, terminal_width=100, max_content_width=100)
    context.help_option_names = ["-h", "--help"]
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            yield from _help_texts(command.commands[child], context, child)


def config_reference() -> str:
    """Every section and field of the config, from the classes that check it."""
    parts = [_CONFIG_INTRODUCTION]
    parts += _section_reference("", Config, set())
    return "\n".join([*parts, sweep_reference()])


def sweep_reference() -> str:
    """As config_reference, of the files of sweeps."""
    ranges = _section_reference("vary.KEY", Range, set())
    return "\n".join([_SWEEP_INTRODUCTION, *_section_reference("", SweepConfig, set()), *ranges])


def _section_reference(path: str, section: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """The section and those below it; a table of some kind, which may stand in many places, at the first alone."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    below: list[tuple[str, type[BaseModel]]] = []
    for name, field in section.model_fields.items():
        key = f"{path}.{name}".lstrip(".")
        star = "" if affects_numbers(field) else " *"
        rows.append(f"| `{name}`{star} | {type_name(field)} | {default_text(field)} | {field.description} |")
        below += [(key, found) for found in section_types(field.annotation)]
    kind = kind_of(section)
    tag = f' (`kind = "{kind}"`)' if kind else ""
    title = f"`[{path}]`{tag}" if path else "Top level"
    yield f"## {title}\n\n{_one_paragraph(section.__doc__)}\n\n" + "\n".join(rows) + "\n"
    for key, found in below:
        if not ("kind" in found.model_fields and found in seen):
            seen.add(found)
            yield from _section_reference(key, found, seen)


def with_tables(page: str) -> str:
    """A page with every marked table made anew from the measured JSON; it says so where nothing is measured yet.

    A name is that of the JSON, with a part where it holds several tables: `scale.bytes`.
    """

    def table(match: re.Match[str]) -> str:
        name, part = match["name"], match["part"] or ""
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        text = f"Not yet: see `benchmarks/{name}.py`."
        if path.is_file():
            found = json.loads(path.read_text())
            text = found["tables"][part[1:]] if part else found["markdown"]
        return f"<!-- table: {name}{part} -->\n{text}\n<!-- end -->"

    return _MARKED.sub(table, page)


def _one_paragraph(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    for path, content in documents().items():
        write_atomically(path, content.encode("utf-8"))
