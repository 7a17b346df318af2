"""Documents that are made from the program are as it would make them, and what they name is there."""

import re
import shlex
from pathlib import Path

import click
import pytest

from conftest import ROOT
from tristill.pipeline.cli import cli
from tristill.pipeline.config import load_config
from tristill.pipeline.reference import documents, with_tables

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_generated_documents_are_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == documents()[path], "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_paths_in_documents_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:cache|stages|pipeline|configs|docs|tests|benchmarks)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def commands(group: click.Group) -> list[click.Command]:
    children = list(group.commands.values())
    return children + [found for child in children if isinstance(child, click.Group) for found in commands(child)]


@pytest.mark.parametrize("command", commands(cli), ids=lambda command: command.name)
def test_every_command_has_help_and_a_runnable_example(command: click.Command) -> None:
    assert command.help
    if not isinstance(command, click.Group):
        assert "Example" in command.help
        assert "tristill " in command.help
    assert all(isinstance(option, click.Argument) or option.help for option in command.params)  # type: ignore[attr-defined]


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z -]+):", makefile, re.MULTILINE))
    names = {name for line in targets for name in line.split()}
    named = set(re.findall(r"`make ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert named <= names


def test_examples_in_help_are_commands_that_parse() -> None:
    for command in commands(cli):
        for line in re.findall(r"^\s+tristill (.+)$", command.help or "", re.MULTILINE):
            parsed(line)


def parsed(line: str) -> tuple[str, ...]:
    """The `--set` values of a command line that the program takes; of an example, words in capitals are places."""
    command: click.Command = cli
    words = shlex.split(re.split(r" [|>] ", line)[0])
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    return tuple(command.make_context("example", words).params.get("assignments", ()))


USE = re.search(r"^## Use\n(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
assert USE
SPANS = [span.replace(r"\|", "|") for span in re.findall(r"`([^`]+)`", USE[1])]
LINES = [span.removeprefix("tristill ") for span in SPANS if span.startswith(("tristill ", "--set ", "--run-dir "))]


@pytest.mark.parametrize("line", LINES)
def test_every_command_of_the_readme_parses_and_every_setting_is_taken_by_the_default_config(line: str) -> None:
    assert len(LINES) > 25
    assignments = parsed(f"run {line}" if line.startswith("--") else line)
    load_config(ROOT / "configs" / "demo.toml", tuple(one for one in assignments if one != "KEY=VALUE"))


def test_a_table_that_is_not_measured_says_who_would_measure_it() -> None:
    page = "before\n<!-- table: no_such -->\nan old table\n<!-- end -->\nafter\n"
    expected = "before\n<!-- table: no_such -->\nNot yet: see `benchmarks/no_such.py`.\n<!-- end -->\nafter\n"
    assert with_tables(page) == expected
