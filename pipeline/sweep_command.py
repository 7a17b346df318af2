"""The command `sweep`; see pipeline.cli."""

import importlib.util
from pathlib import Path

import click

from tristill.pipeline.errors import MissingPackageError
from tristill.pipeline.runner import plan, run_steps
from tristill.pipeline.sweep.check import check_settings
from tristill.pipeline.sweep.config import load_sweep
from tristill.pipeline.sweep.student import DEFAULT_SWEEP, Base
from tristill.pipeline.tables import echo_tables


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    show_default=str(DEFAULT_SWEEP),
    help="TOML file that says what is varied, of which base; the sweep is named after it. Without it, the base is the "
    "run that --run-dir names, if that has a config.toml.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one setting of the sweep or of its base, by its dotted key; may be repeated.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    show_default="run_dir of the sweep, or runs/<name of base>",
    help="Folder of the run whose cache is read.",
)
@click.option("--make-cache", is_flag=True, help="First run what of the base's steps up to the cache is missing.")
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of tables.")
@click.option("--take-over", is_flag=True, help="Go on with trials that run elsewhere: their processes must be gone.")
@click.option("--force", is_flag=True, help="Remove what an earlier sweep of this name left and begin anew.")
def sweep(
    config_path: Path | None,
    assignments: tuple[str, ...],
    run_dir: Path | None,
    make_cache: bool,
    as_json: bool,
    take_over: bool,
    force: bool,
) -> None:
    """Train many students from one cache: every combination of some settings, or those that a search picks.

    The same command again goes on where it was; run more than once at a time, it shares the work.

    \b
    Examples:
        tristill sweep --config configs/sweeps/demo.toml
        tristill sweep --set 'vary.distill.alpha=[0.1, 0.5]' --set 'search={kind="tpe", trials=20}'
    """
    if importlib.util.find_spec("optuna") is None:
        raise MissingPackageError("a sweep needs the package optuna, which is not installed; pip install -e '.[sweep]'")
    found, of_base = load_sweep(config_path or DEFAULT_SWEEP, assignments)
    base = Base(found, config_path, of_base, run_dir)
    if make_cache:
        check_settings(found, base)
        run_steps(plan(base.workspace, "dump-logits"), base.arguments)
    from tristill.pipeline.sweep.ledger import ledger_text
    from tristill.pipeline.sweep.records import results_text
    from tristill.pipeline.sweep.run import run_sweep

    results = run_sweep(found, base, force=force, take_over=take_over)
    if as_json:
        click.echo(results.model_dump_json(indent=2))
        return
    echo_tables(results_text(results, base.run_dir))
    click.echo()
    click.echo(ledger_text(results.ledger) if results.ledger else f"no ledger: {results.ledger_missing}")
