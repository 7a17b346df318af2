"""docs/tutorial.md: every command there runs as it is written, and prints what stands below it.

The whole takes minutes, with a student of some use at its end. The fast test runs the same commands, to the letter, on
a configs/tutorial.toml of the same form with smaller numbers, and looks at the form of what they print.
"""

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import tomli_w

from benchmarks.tutorial import PAGE, Example, environment, examples, run, shortened, with_outputs
from conftest import ROOT
from tristill.pipeline.cli import cli

PAGE_TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = examples(PAGE_TEXT)
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?%?")
# Of the machine or of the moment: speeds, times, memory, versions, hashes.
OF_THE_MACHINE = re.compile(
    r"[\d.,]+(?= (?:\w+/s|s\b|s left|positions/s))|\b[0-9a-f]{64}\b|(?<=xllamacpp )[\d.]+|(?<=PyTorch )[\d.]+\S*|"
    r"(?<=transformers )[\d.]+"
)
COLUMNS_OF_THE_MACHINE = re.compile(r"/s$|RSS|over the teacher")
# What of a text that differs by machine is of the same form on all: titles, columns, places, how much was written.
FORM_OF_TEXT = re.compile(r"\w+, window \d+ of [\d,]+|\| position .*|\| \d+ |\d+ tokens after \d+|runs/[^:]+: ")
TINY = {
    "data": {"max_train_tokens": 60_000, "max_validation_tokens": 5_000},
    "teacher.model": {"layers": 1, "mlp_width": 256},
    "teacher.training": {"steps": 40, "warmup_steps": 5, "batch_windows": 2},
    "cache": {"max_train_windows": 60, "calibration_windows": 32},
    "distill.training": {"steps": 20, "warmup_steps": 5, "batch_windows": 2},
    "data.tokenizer": {"train_bytes": 300_000},
}


def comparable(output: str, *, is_text: bool) -> list[tuple[str, list[str]]]:
    """Each line as its words, with numbers in it replaced, and those numbers; none of those of a machine."""
    lines, before, machine_columns = [], "", set[int]()
    for line in shortened(output).splitlines():
        if is_text:
            if not (found := FORM_OF_TEXT.match(line)):
                continue
            line = found[0]  # noqa: PLW2901
        if re.fullmatch(r"[|-]+", line):
            titles = before.split("|")
            machine_columns = {n for n, title in enumerate(titles) if COLUMNS_OF_THE_MACHINE.search(title.strip())}
        elif line.startswith("|"):
            before, cells = line, line.split("|")
            line = "|".join("-" if n in machine_columns else cell for n, cell in enumerate(cells))  # noqa: PLW2901
        line = OF_THE_MACHINE.sub("*", line)  # noqa: PLW2901
        words = re.sub(r"-{2,}", "--", " ".join(NUMBER.sub("#", line).split()))
        lines.append((words, NUMBER.findall(line)))
    return lines


def is_close(found: str, expected: str) -> bool:
    """Within a third, or 0.05, of what trained models make, which differs with threads, processors and versions.

    A figure in the notation of errors, 1.2e-02, may be ten times as large or small: it is a largest error.
    """
    a, b = (float(number.replace(",", "").rstrip("%")) for number in (found, expected))
    if "e" in found or "e" in expected:
        return max(a, b) <= 10 * max(min(a, b), 1e-4)
    return abs(a - b) <= max(abs(a), abs(b)) / 3 or abs(a - b) <= 0.05


def run_all(folder: Path) -> Iterator[tuple[Example, str]]:
    variables = {**environment(folder), "OMP_NUM_THREADS": "1"}
    for example in EXAMPLES:
        yield example, run(example, folder, variables)


def test_every_command_of_the_page_exists_with_these_options() -> None:
    shown = re.sub(r"<!--.*?-->", "", PAGE_TEXT, flags=re.DOTALL)
    lines = [example.command.partition(" | ")[0] for example in EXAMPLES if example.command.startswith("tristill ")]
    lines += [f"tristill {arguments}" for arguments in re.findall(r"`tristill ([^`]+)`", shown)]
    assert len(lines) >= 10
    for line in lines:
        words = iter(shlex.split(line)[1:])
        command: click.Command = cli
        while isinstance(command, click.Group):
            command = command.commands[next(words)]
        options = {name for option in command.params for name in option.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_every_command_of_the_page_has_its_output() -> None:
    assert len(EXAMPLES) >= 10
    for example in EXAMPLES:
        assert example.output.strip(), f"{example.command}: run `python -m benchmarks.tutorial`"
    assert with_outputs(PAGE_TEXT, iter([example.output for example in EXAMPLES])) == PAGE_TEXT


def test_commands_of_a_page_are_found_with_what_stands_below_them() -> None:
    page = (
        "text\n\n```console\n$ one\nits output\n\nand more\n$ two <<'END'\n> a line\n> END\n```\n\n```sh\n$ not this\n```\n"
        "<!-- off\n```console\n$ nor this\n```\n-->\n```console text\n$ three\nfree\n```\n"
    )
    assert examples(page) == [
        Example("one", "its output\n\nand more\n", is_text=False),
        Example("two <<'END'\na line\nEND", "", is_text=False),
        Example("three", "free\n", is_text=True),
    ]
    filled = with_outputs(page, iter(["1\n", "2\n", "3\n"]))
    assert [example.output for example in examples(filled)] == ["1\n", "2\n", "3\n"]
    assert "$ nor this\n```" in filled
    assert with_outputs(filled, iter(["its output\n\nand more\n", "", "free\n"])) == page


def test_comparison_forgives_what_machines_do_and_nothing_else() -> None:
    line = "student: 100 of 100 (100%) positions, 3,426 positions/s, cross_entropy 3.471\n"
    assert shortened(f"wait: 3 s\nstudent: 5 of 100 (5%) positions, 1 positions/s, 9 s left\n{line}") == line
    table = "| model | perplexity | positions/s |\n|---|---|---|\n| teacher | 60.78 | 3,000 |\n"
    assert comparable(table, is_text=False) == [
        ("| model | perplexity | positions/s |", []),
        ("|--|--|--|", []),
        ("| teacher | # |-|", ["60.78"]),
    ]
    assert comparable(line, is_text=False)[0] == (
        "student: # of # (#) positions, * positions/s, cross_entropy #",
        ["100", "100", "100%", "3.471"],
    )
    assert comparable("def main(x):\n60 tokens after 4 of prompt in 1 s\n", is_text=True) == [
        ("# tokens after #", ["60", "4"])
    ]
    assert is_close("60.78", "65.00")
    assert not is_close("60.78", "95")
    assert is_close("0.0109", "0.0349")
    assert is_close("1.4e-02", "5.0e-02")
    assert not is_close("1.4e-02", "5.0e-01")


def test_the_page_runs_as_it_is_written_with_smaller_numbers_in_its_config(tmp_path: Path) -> None:
    settings = tomllib.loads((ROOT / "configs" / "tutorial.toml").read_text())
    for section, changes in TINY.items():
        place = settings
        for part in section.split("."):
            place = place[part]
        place.update(changes)
    shutil.copytree(ROOT / "configs" / "sweeps", tmp_path / "configs" / "sweeps")
    (tmp_path / "configs" / "tutorial.toml").write_text(tomli_w.dumps(settings))
    for example, output in run_all(tmp_path):
        found, documented = (comparable(text, is_text=example.is_text) for text in (output, example.output))
        assert [words for words, _ in found] == [words for words, _ in documented], example.command


@pytest.mark.slow
def test_the_page_prints_what_it_says(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for example, output in run_all(tmp_path):
        found, documented = (comparable(text, is_text=example.is_text) for text in (output, example.output))
        assert [words for words, _ in found] == [words for words, _ in documented], example.command
        if example.is_text:
            continue
        for (line, numbers), (_, expected) in zip(found, documented, strict=True):
            for number, wanted in zip(numbers, expected, strict=True):
                assert is_close(number, wanted), f"{example.command}: found {number}, expected {wanted}, in: {line}"
