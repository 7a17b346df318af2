"""What others wrote reaches a terminal as text that can be seen, and no state of the streams makes good work fail."""

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pseudo_terminal import tristill_on_a_terminal
from tokenizers import Tokenizer, models

from conftest import ENVIRONMENT, ROOT, tristill
from tristill.cache import Cache
from tristill.pipeline.__main__ import main
from tristill.pipeline.results import text_table
from tristill.stages.interrupt import ending_signals
from tristill.stages.progress import Progress
from tristill.stages.visible import Painted, _VisibleStream, guard_output, visible, visible_lines

HOSTILE = "\x1b]0;OWNED\x07\x1b[2J\x1b[8m\r\x08\x9b2J\x85\u2028\u202e\u2066\udc80\x7f"
FORGED = f"{HOSTILE}\nerror: forged\nevery byte is as it was written"


@given(st.text())
def test_what_is_visible_obeys_nobody_and_printable_text_stays_as_it_is(text: str) -> None:
    joiners = "\u200c\u200d"  # which scripts and emoji need
    assert all(c.isprintable() or c in joiners or unicodedata.category(c) == "Zs" for c in visible(text))
    if text.isprintable():
        assert visible(text) == text
    lines = text.replace("\r", "").replace("\t", " ").split("\n")
    assert visible_lines("\n".join(lines)).split("\n") == [visible(line) for line in lines]


def test_characters_that_cannot_be_printed_have_pictures_or_numbers() -> None:
    assert visible("\x1b[2J\x00\t\x7f") == "\u241b[2J\u2400\u2409\u2421"
    assert visible("a\u202eb\x9b1m\ufeff\udc80") == "a<U+202E>b<U+009B>1m<U+FEFF><U+DC80>"
    assert visible_lines("\ra\n\tb\r\n\r\r\n") == "\u240da\n\tb\r\n\u240d\r\n"


def test_a_log_keeps_one_message_one_paragraph_whoever_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.StringIO() for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    guard_output()
    print(FORGED)
    print(f"error: {FORGED}", file=sys.stderr)
    print(f"  one\n  two\n\n{FORGED}\n", file=sys.stderr, end="")
    logging.StreamHandler().handle(logging.makeLogRecord({"msg": FORGED}))  # as libraries warn
    sys.stderr.write("\n\nerror: forged")
    for stream in streams.values():
        text = stream.getvalue()
        assert all(c.isprintable() or c == "\n" for c in text)
        assert "OWNED" in text
    lines = streams["stderr"].getvalue().splitlines()
    assert [line for line in lines if line.lstrip().startswith("error:") and not line.startswith("  ")] == [
        f"error: {visible(HOSTILE)}"
    ]
    assert "  one" in lines
    assert "  two" in lines


def test_progress_bars_and_text_that_we_painted_keep_their_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    guard_output()
    with Progress(f"a{FORGED}", 2, "units") as progress:
        progress.advance(1, FORGED)
    sys.stderr.write(Painted("\x1b[1mbold\x1b[0m"))
    shown = stream.getvalue()
    assert "\ra\u241b]0;OWNED" in shown
    assert shown.endswith("\x1b[1mbold\x1b[0m")
    assert not re.search(r"^(error|every)", shown, re.MULTILINE)
    assert "\x1b" not in shown.removesuffix("\x1b[1mbold\x1b[0m").replace("\x1b[A", "")


def test_cells_of_tables_are_visible_and_keep_their_line() -> None:
    table = text_table([["model"], [FORGED]])
    assert len(table.split("\n")) == 3
    assert all(c.isprintable() or c == "\n" for c in table)


def test_a_result_that_cannot_be_written_is_an_error_once_and_a_log_that_cannot_be_is_none(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        log = _VisibleStream(full, is_log=True)
        log.write("a\n")
        log.flush()
        result = _VisibleStream(full, is_log=False)
        result.write("a\n")
        with pytest.raises(OSError, match="No space left"):
            result.flush()
        result.flush()
        with pytest.raises(OSError, match="No space left"):
            full.close()


def test_a_hostile_manifest_forges_no_verdict(small_cache: Cache) -> None:
    path = small_cache.folder / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), FORGED: 1}))
    outcome = tristill("cache", "verify", str(small_cache.folder))
    assert outcome.code == 1
    assert outcome.stdout == ""
    lines = outcome.stderr.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == [lines[0]]
    assert lines[0].startswith("error: ")
    assert all(c.isprintable() or c == "\n" for c in outcome.stderr)


@pytest.mark.parametrize("is_on_a_terminal", [False, True])
def test_generated_text_is_visible_wherever_it_goes(finished_run: Path, tmp_path: Path, is_on_a_terminal: bool) -> None:
    shutil.copytree(finished_run / "students" / "student", tmp_path / "student")
    vocabulary = {f"{HOSTILE[:-2]}\n\t{i}": i for i in range(512)}
    unknown = next(iter(vocabulary))
    Tokenizer(models.WordLevel(vocabulary, unk_token=unknown)).save(str(tmp_path / "student" / "tokenizer.json"))
    command = ["generate", str(tmp_path / "student"), "--max-tokens", "2", "--config", "configs/test.toml"]
    command += ["--run-dir", str(finished_run)]
    if is_on_a_terminal:
        code, text = tristill_on_a_terminal(*command)
    else:
        outcome = tristill(*command)
        code, text = outcome.code, outcome.stdout
    assert code == 0, text
    assert "\u241b]0;OWNED\u2407" in text
    assert all(c.isprintable() or c in "\n\t" for c in text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--seed", FORGED], "Invalid value for '--seed'"),
        (["no\x1b[8msuch\nerror: forged"], "No such command"),
        (["config-free", "--config", "x"], "No such command"),
        (["distill", "--set", f"{FORGED}=1"], "problems"),
        (["tokenize", "--config", FORGED], "found no config there"),
    ],
)
def test_what_a_user_is_told_of_his_own_words_is_visible(arguments: list[str], message: str) -> None:
    arguments = [argument.replace("\udc80", "") for argument in arguments]
    outcome = tristill(*arguments)
    assert outcome.code == 2, outcome.stderr
    assert message in outcome.stderr
    assert all(c.isprintable() or c == "\n" for c in outcome.stderr)
    assert not [line for line in outcome.stderr.splitlines() if line.startswith("error: forged")]


def closed(*arguments: str, streams: str) -> "subprocess.CompletedProcess[str]":
    command = f'exec {sys.executable} -m pipeline "$@" {streams}'
    return subprocess.run(
        ["sh", "-c", command, "sh", *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("streams", "code", "printed"),
    [("2>&-", 0, True), ("2>/dev/full", 0, True), (">&- 2>&- <&-", 0, False), (">/dev/full", 1, False)],
)
def test_verify_of_an_intact_cache_needs_no_stream_but_that_of_its_result(
    small_cache: Cache, streams: str, code: int, printed: bool
) -> None:
    done = closed("cache", "verify", str(small_cache.folder), streams=streams)
    assert done.returncode == code, done.stderr
    assert done.stdout == f"{small_cache.folder}: every byte is as it was written\n" * printed
    assert "Traceback" not in done.stderr
    if code:
        assert "No space left on device" in done.stderr


def test_a_prompt_from_a_closed_stdin_is_refused(finished_run: Path) -> None:
    options = ("--config", "configs/test.toml", "--run-dir", str(finished_run))
    done = closed("generate", "--prompt", "-", *options, streams="<&-")
    assert done.returncode == 2
    assert "found stdin closed, expected the prompt there" in done.stderr
    assert "Traceback" not in done.stderr


def test_closed_descriptors_are_not_those_of_files_opened_later(tmp_path: Path) -> None:
    script = (
        "import os, sys; from tristill.stages.visible import open_closed_descriptors; open_closed_descriptors(); "
        "sys.exit(os.open(sys.argv[1], os.O_CREAT))"
    )
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", script, str(tmp_path / "file")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=False)
    assert done.returncode > 2
    assert (tmp_path / "file").exists()


def test_a_run_folder_whose_name_is_no_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path / "run") + b"\xff")
    done = closed("tokenize", "--config", "configs/test.toml", "--run-dir", folder, streams="")
    assert done.returncode == 2
    assert "found a name that is not UTF-8 text" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            MemoryError("Unable to allocate 2.00 MiB"),
            "memory is short (MemoryError: Unable to allocate 2.00 MiB); free",
        ),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"), "memory is short ("),
        (
            KeyError("x\nerror: forged"),
            "found a fault of tristill, KeyError: 'x\\nerror: forged'; set TRISTILL_DEBUG=1",
        ),
        (
            type("PanicException", (BaseException,), {})("Onig"),
            "a library fails on a file (Onig), as on a tokenizer.json",
        ),
    ],
)
def test_an_error_that_nobody_foresaw_is_one_message(
    error: BaseException, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(interrupts: object) -> int:
        raise error

    monkeypatch.setattr("tristill.pipeline.__main__._run", fail)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    handlers = {signum: signal.getsignal(signum) for signum in ending_signals()}
    monkeypatch.delenv("TRISTILL_DEBUG", raising=False)
    monkeypatch.setenv("RUST_BACKTRACE", "0")
    with pytest.raises(SystemExit) as ended:
        main()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_plot_holds_labels_that_xml_cannot() -> None:
    pytest.importorskip("matplotlib")
    from tristill.pipeline.report.drawing import bars

    assert "\\u241b" in bars(["a\x1b\x00"], [1.0], ["\x07"], "key", "x\x0b")
