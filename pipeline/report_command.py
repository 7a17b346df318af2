"""The command `report`; see pipeline.cli."""

from pathlib import Path

import click
from click.core import ParameterSource

from pipeline.options import run_options, workspace_of
from pipeline.workspace import RUN_CONFIG_NAME


@click.command()
@click.option("--no-samples", is_flag=True, help="Leave out texts by teacher and students, which load the models.")
@run_options
def report(no_samples: bool, config_path: Path, assignments: tuple[str, ...], run_dir: Path | None) -> None:
    """Write one HTML page with the run's story: data, teacher, cache, students, evaluation, sweeps, costs.

    The page is report.html in the run folder. It needs no network and no other file, and shows what there is: a run
    that is not finished has a page too. Takes the extra `report`. With --run-dir alone, the config is the run's own.

    \b
    Examples:
        tristill report
        tristill report --run-dir runs/demo --no-samples
    """
    from pipeline.report.page import write_report

    own = run_dir / RUN_CONFIG_NAME if run_dir else None
    is_named = click.get_current_context().get_parameter_source("config_path") is not ParameterSource.DEFAULT
    of_run = own if own is not None and own.is_file() and not is_named else config_path
    path = write_report(workspace_of(of_run, assignments, run_dir), has_samples=not no_samples)
    click.echo(str(path))
