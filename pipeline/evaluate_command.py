"""The command `evaluate`; see pipeline.cli."""

import json
from pathlib import Path

import click

from tristill.cache import SplitName
from tristill.pipeline.options import MOST_THREADS, run_options, workspace_of
from tristill.pipeline.tables import echo_tables
from tristill.pipeline.workspace import Workspace


@click.command()
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option(
    "--packed", "is_packed", is_flag=True, help="Sizes and speeds as deployed, of `student` if none is given."
)
@click.option(
    "--threads",
    type=click.IntRange(min=1, max=MOST_THREADS),
    show_default="all that torch uses",
    help="With --packed: threads of every contender.",
)
@click.option(
    "--split",
    type=click.Choice(["validation", "test"]),
    default="validation",
    show_default=True,
    help="Which split; test is there where data.test names its source.",
)
@click.option("--force", is_flag=True, help="Compute metrics again that nothing has changed for.")
@run_options
def evaluate(
    names: tuple[str, ...],
    as_json: bool,
    is_packed: bool,
    threads: int | None,
    split: SplitName,
    force: bool,
    config_path: Path | None,
    assignments: tuple[str, ...],
    run_dir: Path | None,
) -> None:
    """Compute held-out metrics of checkpoints: `teacher`, students by name, or any model folder; all if none is given.

    Metrics of unchanged weights, targets and settings are taken from where they were computed. The result is also
    written to evaluation.json in the run folder (evaluation-test.json of the test split).

    With --packed, instead of metrics: bytes on disk, and tokens per second of prompt and of generation, of students
    with packed weights in PyTorch and as GGUF files in llama.cpp (extra `gguf`), beside their FP32 teacher; also
    written to deployment.json.

    \b
    Examples:
        tristill evaluate teacher student runs/other/students/student
        tristill evaluate --packed --threads 1
    """
    if threads is not None and not is_packed:
        raise click.UsageError("--threads belongs to --packed; leave it out, or add --packed")
    workspace = workspace_of(config_path, assignments, run_dir)
    if is_packed:
        print_deployment(workspace, names, threads, as_json=as_json)
    else:
        print_evaluation(workspace, names, as_json=as_json, force=force, split=split)


def print_evaluation(
    workspace: Workspace,
    names: tuple[str, ...],
    *,
    as_json: bool,
    force: bool = False,
    split: SplitName = "validation",
) -> None:
    """Held-out metrics of models."""
    from tristill.pipeline.evaluation import evaluate_models
    from tristill.pipeline.results import metrics_table

    metrics = evaluate_models(workspace, names, force=force, split=split)
    click.echo(json.dumps(metrics, indent=2)) if as_json else echo_tables(metrics_table(metrics))


def print_deployment(workspace: Workspace, names: tuple[str, ...], threads: int | None, *, as_json: bool) -> None:
    """Sizes and speeds of students as they are deployed."""
    from tristill.pipeline.deployment import deployment_table, evaluate_deployment

    found = evaluate_deployment(workspace, names, threads)
    click.echo(found.model_dump_json(indent=2)) if as_json else echo_tables(deployment_table(found))
