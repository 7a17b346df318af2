"""What a user sees of long work: a bar with speed and time left on a terminal, plain lines in a pipe."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pseudo_terminal import on_a_terminal, tristill_on_a_terminal

from conftest import ENVIRONMENT, ROOT, tristill
from tristill.stages.progress import Progress, waiting

LAST_LINE = r"student: 10,240 of 10,240 \(100%\) positions, [\d,]+ positions/s, cross_entropy \d\.\d+, forward_kl \d"


def test_a_training_on_a_terminal_shows_speed_time_left_and_loss(copied_run: Path) -> None:
    command = ("distill", "--config", "configs/test.toml", "--run-dir", str(copied_run), "--force")
    code, sent = tristill_on_a_terminal(*command, columns=160)
    assert code == 0, sent
    bars = [part for part in re.split(r"[\r\n]", sent) if part.startswith("student: ")]
    shown = re.compile(
        r"student: +\d+%\|.*\| [\d.k]+/10\.2k \[\d\d:\d\d<\d\d:\d\d, +[\d.]+k? positions/s, "
        r"cross_entropy \d\.\d+, forward_kl \d\.\d+, hidden_mse \d\.\d+\]"
    )
    assert any(shown.fullmatch(bar.rstrip()) for bar in bars), bars
    assert all(len(bar) <= 160 for bar in bars)
    assert [part.split("|")[0] for part in re.split(r"[\r\n]", sent) if "evaluate student" in part][
        -1
    ] == "evaluate student: 100%"


def test_a_training_in_a_pipe_is_plain_lines(copied_run: Path) -> None:
    outcome = tristill("distill", "--config", "configs/test.toml", "--run-dir", str(copied_run), "--force")
    assert outcome.code == 0, outcome.stderr
    assert all(character == "\n" or character.isprintable() for character in outcome.stderr)
    assert re.search(LAST_LINE, outcome.stderr)
    *_, evaluated, said = outcome.stderr.splitlines()
    assert evaluated.startswith("evaluate student: 3,968 of 3,968 (100%) positions, ")
    assert said.startswith("student: perplexity ")


SLOW_WORK = """
import time
from tristill.stages.progress import Progress, say, waiting
with waiting("a wait"):
    time.sleep(WAIT)
with Progress("work", 40, "units") as progress:
    for n in range(40):
        time.sleep(0.06)
        progress.advance(1, f"loss {n}")
        if n == 20:
            say("a word")
"""


def run_script(script: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_a_word_while_a_bar_stands_has_a_line_of_its_own() -> None:
    code, sent = on_a_terminal([sys.executable, "-c", SLOW_WORK.replace("WAIT", "1.2").replace("0.06", "0.02")])
    assert code == 0, sent
    assert "\na word\n" in sent.replace("\r", "\n")
    assert re.search(r"\ra wait: 00:01\r *\r", sent), "it tells in place, and goes when it is over"
    assert re.search(r"work: 100%\|.*\| 40\.0/40\.0 \[\d\d:\d\d<00:00, +[\d.]+ units/s, loss 39\]\n$", sent)


def test_lines_tell_how_far_work_is_from_its_first_second_on() -> None:
    waits, lines = [], []
    for line in run_script(SLOW_WORK.replace("WAIT", "1.5")):
        (waits if line.startswith("a wait") else lines).append(line)
    assert re.fullmatch(r"a wait: 1 s(\na wait: \d+ s)*\na wait: \d+ s, done", "\n".join(waits))
    lines.remove("a word")
    first = re.fullmatch(r"work: (\d+) of 40 \((\d+)%\) units, (\d+) units/s, (\d+) s left, loss (\d+)", lines[0])
    assert first is not None
    done, percent, speed, left_s, loss = map(int, first.groups())
    assert 3 <= done <= 20
    assert loss == done - 1
    assert percent == pytest.approx(done / 40 * 100, abs=0.51)
    assert left_s == pytest.approx((40 - done) / speed, abs=1)
    assert len(lines) <= 8
    assert re.fullmatch(r"work: 40 of 40 \(100%\) units, \d+ units/s, loss 39", lines[-1])


def test_a_short_wait_is_not_worth_a_word_and_short_work_one_line() -> None:
    script = SLOW_WORK.replace("WAIT", "0").replace("0.06", "0")
    assert [re.sub(r"[\d,]+ units/s", "S", line) for line in run_script(script)] == [
        "a word",
        "work: 40 of 40 (100%) units, S, loss 39",
    ]


def test_an_error_ends_a_wait_and_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), waiting("a wait"):
        json.loads("1") / 0
    with pytest.raises(ZeroDivisionError), Progress("work", 3, "units") as progress:
        progress.advance(1 // 0)
    assert capsys.readouterr().err == ""
