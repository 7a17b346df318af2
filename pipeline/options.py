"""The options of every command, and what they say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.config import load_config
from pipeline.workspace import RUN_CONFIG_NAME, Workspace

_Command = TypeVar("_Command", bound=Callable[..., Any])


def run_options(command: _Command) -> _Command:
    """The options of every command: which config, what to change in it, and which run folder."""
    for option in reversed(
        (
            click.option(
                "--config",
                "config_path",
                type=click.Path(path_type=Path),
                default=Path("configs/demo.toml"),
                show_default=True,
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


def workspace_of(config_path: Path, assignments: tuple[str, ...], run_dir: Path | None) -> Workspace:
    """The checked config and the run folder; a run's own config.toml belongs to the folder it is in."""
    default = config_path.parent if config_path.name == RUN_CONFIG_NAME else Path("runs") / config_path.stem
    return Workspace(load_config(config_path, assignments), run_dir or default)
