"""Long work shows a bar on a terminal and plain lines elsewhere."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

from conftest import ROOT, tristill
from tristill.cache import Cache


def test_plain_lines_when_piped(small_cache: Cache) -> None:
    outcome = tristill("cache", "verify", str(small_cache.folder))
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("verify: ")
    assert "(100%) bytes, " in line
    assert line.endswith("bytes/s")
    assert "\r" not in outcome.stderr


def test_a_bar_with_speed_on_a_terminal(small_cache: Cache) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-m", "tristill.pipeline", "cache", "verify", str(small_cache.folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    while part := read_or_end(ours):
        shown += part
    os.close(ours)
    assert done.stdout.decode().startswith(str(Path(small_cache.folder)))
    assert b"\rverify: 100%" in shown
    assert b"bytes/s" in shown


def read_or_end(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 100_000)
    except OSError:  # Linux says so when the other side is closed
        return b""
