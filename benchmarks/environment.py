"""Where a number was measured."""

import platform
import subprocess
from importlib.metadata import version
from typing import Any

from tristill.stages.resources import machine


def environment() -> dict[str, Any]:
    """Processor, cores, library versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607
    return {
        **machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "commit": commit.stdout.strip() or None,
    }
