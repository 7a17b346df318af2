"""The command `plan`; see pipeline.cli."""

from pathlib import Path

import click

from tristill.pipeline.options import Number, run_options, workspace_of
from tristill.pipeline.tables import echo_tables


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of tables.")
@click.option(
    "--seconds",
    type=Number(0.1, 86_400),
    default=5.0,
    show_default=True,
    help="Of the measured part of every rehearsal, about; each takes some more to start and to evaluate.",
)
@click.option(
    "--teacher-seconds",
    type=Number(0.1, 86_400),
    default=90.0,
    show_default=True,
    help="At most, of training a teacher that is not there yet, which its cache depends on; to a third of its steps.",
)
@run_options
def plan(
    as_json: bool,
    seconds: float,
    teacher_seconds: float,
    config_path: Path | None,
    assignments: tuple[str, ...],
    run_dir: Path | None,
) -> None:
    """Predict time, memory and disk of all steps that a run still needs, without running them.

    Every step is rehearsed: run in small by its own code, in a process of its own, in a temporary folder. Of the run
    folder nothing is touched but plan.json, which `tristill plan` compares with what happened once steps are finished.

    \b
    Example:
        tristill plan --config configs/demo.toml
    """
    from tristill.pipeline.plan.compare import compare
    from tristill.pipeline.plan.disk import needed_and_free
    from tristill.pipeline.plan.planning import Budget, plan_of
    from tristill.pipeline.plan.text import comparison_table, disk_lines, plan_text

    workspace = workspace_of(config_path, assignments, run_dir)
    found = plan_of(workspace, Budget(seconds, teacher_seconds))
    if as_json:
        click.echo(found.model_dump_json(indent=2))
        return
    echo_tables(plan_text(found))
    if lines := list(disk_lines(*needed_and_free(found, workspace))):
        click.echo("\n" + "\n".join(lines))
    if rows := compare(workspace):
        echo_tables("\n" + comparison_table(rows))
