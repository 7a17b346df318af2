"""The command `report`; see pipeline.cli."""

from pathlib import Path

import click

from tristill.pipeline.options import run_options, workspace_of


@click.command()
@click.option("--no-samples", is_flag=True, help="Leave out texts by teacher and students, which load the models.")
@run_options
def report(no_samples: bool, config_path: Path | None, assignments: tuple[str, ...], run_dir: Path | None) -> None:
    """Write one HTML page with the run's story: data, teacher, cache, students, evaluation, sweeps, costs.

    The page is report.html in the run folder. It needs no network and no other file, and shows what there is: a run
    that is not finished has a page too. Takes the extra `report`.

    \b
    Examples:
        tristill report
        tristill report --run-dir runs/demo --no-samples
    """
    from tristill.pipeline.report.page import write_report

    workspace = workspace_of(config_path, assignments, run_dir)
    for name in workspace.config.link_names:
        workspace.link(name).leave_out("cache.dir", "cache.url")
    click.echo(str(write_report(workspace, has_samples=not no_samples)))
