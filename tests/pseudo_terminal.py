"""Runs a command as on a terminal."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

from conftest import ENVIRONMENT, ROOT


def tristill_on_a_terminal(
    *arguments: str, columns: int = 100, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """See on_a_terminal."""
    return on_a_terminal([sys.executable, "-m", "tristill.pipeline", *arguments], columns, environment)


def on_a_terminal(command: list[str], columns: int = 100, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """The exit code, and all that the terminal was sent, with its newlines as they were written."""
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={"TERM": "xterm-256color", **_without_size(ENVIRONMENT), **(environment or {})},
        )
        os.close(theirs)
        sent = b""
        while part := _read(ours):
            sent += part
        return process.wait(60), sent.decode("utf-8").replace("\r\n", "\n")
    finally:
        os.close(ours)


def _without_size(environment: dict[str, str]) -> dict[str, str]:
    """The terminal has a size of its own, and what runs tests in parallel may have set another."""
    return {name: value for name, value in environment.items() if name not in {"COLUMNS", "LINES"}}


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that nobody holds the other side any more
        return b""
