"""Runs every command of docs/tutorial.md in a fresh folder and writes what they print into the page.

    python -m benchmarks.tutorial

What runs stands in its fences of the kind `console`, after `$ `, with further lines after `> `; the lines below are
what it printed, to either stream, with progress shortened to the last line of each piece of work. A fence of the kind
`console text` holds text that differs from machine to machine, as the corpus does.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tristill.cache.atomic import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FENCE = re.compile(r"^```console(?P<kind>| text)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"^\$ (?P<line>.*(?:\n> .*)*)\n(?P<output>(?:(?!\$ ).*\n)*)", re.MULTILINE)
_PROGRESS = re.compile(r"^(?P<label>[\w. -]+): [\d,]+ (?:of [\d,]+ \(\d+%\) )?\w+, [\d,]+ \w+/s")
_WAIT = re.compile(r"^[\w. :-]+: [\d,]+ s(?:, done)?$")


@dataclass(frozen=True)
class Example:
    """One command of the page and what stands below it; `is_text` where that is of this machine alone."""

    command: str
    output: str
    is_text: bool


def examples(page: str) -> list[Example]:
    """All commands of the page, in order; comments hold none."""
    return [
        Example(found["line"].replace("\n> ", "\n"), found["output"], fence["kind"] == " text")
        for fence in _FENCE.finditer(_COMMENT.sub("", page))
        for found in _COMMAND.finditer(fence["body"])
    ]


def with_outputs(page: str, outputs: Iterator[str]) -> str:
    """The page with these outputs in place of its own."""

    def fence_with_outputs(fence: re.Match[str]) -> str:
        body = _COMMAND.sub(lambda found: f"$ {found['line']}\n{next(outputs)}", fence["body"])
        return f"```console{fence['kind']}\n{body}```"

    parts = re.split(f"({_COMMENT.pattern})", page, flags=re.DOTALL)
    return "".join(part if part.startswith("<!--") else _FENCE.sub(fence_with_outputs, part) for part in parts)


def shortened(output: str) -> str:
    """What a command printed, with the last line of every progress alone, and none of how long a wait has been."""
    lines = [line.rstrip() for line in output.splitlines() if not _WAIT.match(line)]
    labels = [found["label"] if (found := _PROGRESS.match(line)) else None for line in lines]
    kept = [
        line for line, own, after in zip(lines, labels, [*labels, None][1:], strict=True) if own is None or own != after
    ]
    return "".join(f"{line}\n" for line in kept)


def environment(folder: Path) -> dict[str, str]:
    """In which `tristill` and `python` are those of this checkout; adds them to the folder."""
    programs = folder / "bin"
    programs.mkdir()
    for name, arguments in (("tristill", "-m pipeline "), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        (programs / name).chmod(0o755)
    own = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return {**os.environ, **own}


def run(example: Example, folder: Path, variables: dict[str, str]) -> str:
    """Run one command in the folder; what it printed, as it was printed. Raises RuntimeError if it fails."""
    done = subprocess.run(  # the commands are the page's
        ["bash", "-c", example.command],  # noqa: S607
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"$ {example.command}\n{done.stdout}\nended with exit code {done.returncode}")
    return done.stdout


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    outputs = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "configs", folder / "configs")
        variables = environment(folder)
        for example in examples(page):
            print(f"$ {example.command}", flush=True)
            before = time.monotonic()
            outputs.append(shortened(run(example, folder, variables)))
            print(f"{outputs[-1]}({time.monotonic() - before:.1f} s)", flush=True)
    print(f"{time.monotonic() - started:.0f} s in all")
    write_atomically(PAGE, with_outputs(page, iter(outputs)).encode("utf-8"))


if __name__ == "__main__":
    main()
