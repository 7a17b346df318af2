"""The options of every command, and what they say."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from tristill.pipeline.config import load_config, parse_assignment
from tristill.pipeline.errors import ConfigError
from tristill.pipeline.received import refuse_links
from tristill.pipeline.workspace import RUN_CONFIG_NAME, Workspace
from tristill.stages.models.trust import trust_records_of

DEFAULT_CONFIG = Path("configs/demo.toml")
MOST_THREADS = 4096
"""And processes: a machine has none for more, and an interpreter ends where the system refuses one."""
_Command = TypeVar("_Command", bound=Callable[..., Any])


class Number(click.FloatRange):
    """A number within bounds, which NaN is not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; a usage error for any other."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


def run_options(command: _Command) -> _Command:
    """The options of every command: which config, what to change in it, and which run folder."""
    for option in reversed(
        (
            click.option(
                "--config",
                "config_path",
                type=click.Path(path_type=Path),
                show_default=f"config.toml of the folder that --run-dir names, else {DEFAULT_CONFIG}",
                help="TOML file with the settings of the run.",
            ),
            click.option(
                "--set",
                "assignments",
                multiple=True,
                metavar="KEY=VALUE",
                help="Change one setting, by its dotted key; may be repeated.",
            ),
            click.option(
                "--run-dir",
                type=click.Path(path_type=Path, file_okay=False),
                show_default="runs/<config name>",
                help="Folder of the run.",
            ),
        )
    ):
        command = option(command)
    return command


def workspace_of(
    config_path: Path | None, assignments: tuple[str, ...], run_dir: Path | None, cache: Path | None = None
) -> Workspace:
    """The checked config and the run folder.

    A run folder with a config.toml is that run: its config holds where no other is named, and names nothing outside of
    the folder (pipeline/received.py). cache: a cache folder, whose run it is about if neither is named.
    """
    for path in (config_path, run_dir, cache):
        _require_text(path)
    if config_path is None:
        run_dir = run_dir or (run_of_cache(cache) if cache is not None else None)
    own = run_dir / RUN_CONFIG_NAME if run_dir is not None else None
    if config_path is None and run_dir is not None and own is not None:
        trust_records_of(run_dir, is_trusted=False)
        refuse_links(run_dir, own if own.is_file() else DEFAULT_CONFIG)
        if own.is_file():
            given = frozenset(parse_assignment(assignment)[0] for assignment in assignments)
            return Workspace(load_config(own, assignments), run_dir, given=given)
    path = config_path or DEFAULT_CONFIG
    folder = run_dir or (path.parent if path.name == RUN_CONFIG_NAME else Path("runs") / path.stem)
    config = load_config(path, assignments)
    if config_path is not None:  # with a folder of another config, a teacher elsewhere is one that this config gives
        trust_records_of(folder, is_trusted=run_dir is None or config.teacher.path is not None)
    return Workspace(config, folder)


def _require_text(path: Path | None) -> None:
    """Refuses a name that records, which are UTF-8, cannot hold."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ConfigError(
            f"{path}: found a name that is not UTF-8 text, as far as this locale tells; rename it, or set "
            "LC_ALL=C.UTF-8"
        ) from exc


def arguments_of(workspace: Workspace, config_path: Path | None, assignments: tuple[str, ...]) -> list[str]:
    """The options by which another process of this program has the same config and run folder."""
    named = ["--config", str(config_path or DEFAULT_CONFIG)] if workspace.given is None else []
    changes = [part for assignment in assignments for part in ("--set", assignment)]
    return [*named, *changes, "--run-dir", str(workspace.run_dir)]


def run_of_cache(folder: Path) -> Path | None:
    """The run folder that a cache lies in, if it lies in one."""
    run_dir = folder.parent.parent if folder.parent.name == "caches" else folder.parent
    return run_dir if (run_dir / RUN_CONFIG_NAME).is_file() else None
