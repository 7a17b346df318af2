"""The commands `config show`, `explain` and `schema`, and `init`."""

import json
from pathlib import Path

import click

from tristill.pipeline.options import run_options, workspace_of


@click.group("config")
def config_group() -> None:
    """Say what a config means: all of its settings, one of them, or what may stand in it."""


@config_group.command()
@run_options
def show(config_path: Path | None, assignments: tuple[str, ...], run_dir: Path | None) -> None:
    """Print the complete config as TOML that loads again; a comment marks each setting that is not the default.

    \b
    Example:
        tristill config show --set distill.alpha=0.3
    """
    from tristill.pipeline.config_fields import config_text

    click.echo(config_text(workspace_of(config_path, assignments, run_dir).config), nl=False)


@config_group.command()
@click.argument("key")
def explain(key: str) -> None:
    """Say what a setting means, with its type, bounds and default, and what it takes the place of.

    \b
    Example:
        tristill config explain distill.alpha
    """
    from tristill.pipeline.config_fields import explanation

    click.echo(explanation(key))


@config_group.command()
def schema() -> None:
    """Print a JSON schema of configs, by which editors complete and check them.

    \b
    Example:
        tristill config schema > tristill.schema.json
    """
    from tristill.pipeline.config import Config

    click.echo(json.dumps(Config.model_json_schema(), indent=2))


@click.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False), default=Path("configs/mine.toml"))
@click.option("--text", "texts", multiple=True, metavar="FILES", help="Text files to learn from; may be repeated.")
@click.option("--teacher", metavar="MODEL", help="A finished teacher, by folder or hub name; else one is trained.")
def init(path: Path, texts: tuple[str, ...], teacher: str | None) -> None:
    """Write a small config with comments to begin with: on the standard library's text, or files of your own.

    \b
    Examples:
        tristill init configs/mine.toml
        tristill init configs/books.toml --text 'books/*.txt' --teacher HuggingFaceTB/SmolLM2-135M
    """
    from tristill.pipeline.first_config import write_first_config

    write_first_config(path, texts, teacher)
    click.echo(str(path))
