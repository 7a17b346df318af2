"""The command line: each command parses, calls one function and prints one result.

Commands import what they compute with when they run, so that --help loads neither torch nor datasets.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from tristill.cache import SplitName
from tristill.cache.manifest import cache_fingerprint, load_manifest
from tristill.cache.remote import named_place
from tristill.pipeline.cache_url import CacheFolder
from tristill.pipeline.config import DEFAULT_STUDENT, check_link_name, check_student_name
from tristill.pipeline.config_command import config_group, init
from tristill.pipeline.evaluate_command import evaluate, print_evaluation
from tristill.pipeline.export_command import export
from tristill.pipeline.generate_command import generate
from tristill.pipeline.options import MOST_THREADS, Number, arguments_of, run_options, workspace_of
from tristill.pipeline.plan.command import plan
from tristill.pipeline.report_command import report
from tristill.pipeline.runner import execute, run_steps
from tristill.pipeline.runner import plan as steps_to_run
from tristill.pipeline.step import COMMANDS_ON_RANKS, Step
from tristill.pipeline.steps import Distill, DumpLogits, Teacher
from tristill.pipeline.sweep_command import sweep
from tristill.pipeline.tables import echo_tables
from tristill.pipeline.tokenize_step import Tokenize
from tristill.pipeline.workspace import Workspace
from tristill.stages.progress import Progress, say
from tristill.stages.ranks import announced_ranks
from tristill.stages.visible import Painted, visible

_STEPS = ("tokenize", "teacher", "dump-logits", "distill", "evaluate")
_Command = TypeVar("_Command", bound=Callable[..., Any])


class Group(click.Group):
    """Lists commands in the order of the pipeline."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names as they were added."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is called. Torchrun may start those of the heavy steps alone."""
        name, command, rest = super().resolve_command(ctx, args)
        num_ranks = announced_ranks().world_size
        if num_ranks > 1 and name not in COMMANDS_ON_RANKS:
            raise click.UsageError(
                f"{name} works in one process, and WORLD_SIZE announces {num_ranks}; start it without torchrun"
            )
        return name, command, rest


force_option = click.option("--force", is_flag=True, help="Remove what an earlier run left and build anew.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tristill")
def cli() -> None:
    """Distil a full-precision language model into ternary students, offline, from a compact cache.

    \b
    Example: train everything of the demo config, then look at the result.
        tristill run --until distill
        tristill evaluate
    """


@cli.command()
@click.option("--until", type=click.Choice(_STEPS), default="distill", show_default=True, help="The last step to run.")
@click.option("--dry-run", is_flag=True, help="Only say which steps would run.")
@click.option(
    "--ranks",
    type=click.IntRange(min=1, max=MOST_THREADS),
    default=1,
    show_default=True,
    help="Processes of this machine that share each heavy step: one per GPU, or per group of cores.",
)
@run_options
def run(
    until: str, dry_run: bool, ranks: int, config_path: Path | None, assignments: tuple[str, ...], run_dir: Path | None
) -> None:
    """Run all steps that are needed, in order; skip what is up to date, go on with what is partly done.

    \b
    Examples:
        tristill run --until distill --config configs/test.toml
        tristill run --ranks 8
    """
    workspace = workspace_of(config_path, assignments, run_dir)
    steps = steps_to_run(workspace, "distill" if until == "evaluate" else until)
    if dry_run:
        click.echo("\n".join(step.label for step in steps) or "nothing to do")
        return
    run_steps(steps, arguments_of(workspace, config_path, assignments), ranks)
    if until == "evaluate":
        print_evaluation(workspace, (), as_json=False)
    elif until == "distill":
        _print_results(workspace)


@cli.command()
@run_options
@force_option
def tokenize(config_path: Path | None, assignments: tuple[str, ...], run_dir: Path | None, force: bool) -> None:
    """Turn the corpus into a tokenizer and files of token ids.

    \b
    Example:
        tristill tokenize --set data.source.kind=text --set 'data.source.paths=["books/*.txt"]'
    """
    _run_step(Tokenize(workspace_of(config_path, assignments, run_dir)), force)


@cli.command()
@run_options
@force_option
def teacher(config_path: Path | None, assignments: tuple[str, ...], run_dir: Path | None, force: bool) -> None:
    """Train the full-precision teacher, or take the checkpoint that teacher.path names: a student can be a teacher.

    \b
    Example:
        tristill teacher --set teacher.training.steps=2000 --run-dir runs/longer
    """
    _run_step(Teacher(workspace_of(config_path, assignments, run_dir)), force)


@cli.command("dump-logits")
@click.option(
    "--name", default=DEFAULT_STUDENT, show_default=True, help="The student that learns from it: a stage of the chain."
)
@run_options
@force_option
def dump_logits(
    name: str, config_path: Path | None, assignments: tuple[str, ...], run_dir: Path | None, force: bool
) -> None:
    """Write what the teacher knows about every position into the cache.

    \b
    Example:
        tristill dump-logits --set cache.profile.draws=12 --set cache.dir=caches/twelve
    """
    workspace = workspace_of(config_path, assignments, run_dir)
    _run_step(DumpLogits(workspace.link(check_link_name(name, workspace.config))), force)


@cli.command()
@click.option(
    "--name", default=DEFAULT_STUDENT, show_default=True, help="Student; a stage or variant of the config, or new."
)
@click.option(
    "--targets",
    type=click.Choice(["cached", "online", "auto"]),
    help="Where targets come from; without it, distill.targets of the config.",
)
@run_options
@force_option
def distill(
    name: str,
    targets: str | None,
    config_path: Path | None,
    assignments: tuple[str, ...],
    run_dir: Path | None,
    force: bool,
) -> None:
    """Train a ternary student on the cache, with no teacher in memory.

    \b
    Examples:
        tristill distill
        tristill distill --name alpha-03 --set distill.alpha=0.3
        tristill distill --name online --targets online
    """
    changes = (*assignments, f"distill.targets={targets}") if targets else assignments
    workspace = workspace_of(config_path, changes, run_dir)
    _run_step(Distill(workspace, check_student_name(name)), force)


for command in (evaluate, generate, export, sweep, report, plan, init, config_group):
    cli.add_command(command)


@cli.group()
def cache() -> None:
    """Look at a cache, without torch; `fidelity` and the worst cases of `repair` need the teacher."""


def cache_folder_options(command: _Command) -> _Command:
    """A cache folder or URL, or the config that names it."""
    return click.argument("folder", required=False, type=CacheFolder())(run_options(command))


@cache.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@cache_folder_options
def info(
    folder: Path | None, as_json: bool, config_path: Path | None, assignments: tuple[str, ...], run_dir: Path | None
) -> None:
    """Say what a cache holds, how many bytes a position takes, and how the teacher's probability is spread.

    Shares are of a sample of at most 64 chunks of the train split.

    \b
    Example:
        tristill cache info runs/demo/cache
    """
    from tristill.pipeline.cache_info import cache_details, cache_info
    from tristill.pipeline.cache_info_text import cache_info_text

    folder = folder or workspace_of(config_path, assignments, run_dir).named_cache
    found = {**cache_info(folder), **cache_details(folder)}
    click.echo(json.dumps(found, indent=2)) if as_json else echo_tables(cache_info_text(found))


@cache.command()
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="validation",
    show_default=True,
    help="Which split.",
)
@click.option("--window", type=click.IntRange(min=0), default=0, show_default=True, help="Which window of the split.")
@click.option("--windows", type=click.IntRange(min=1), default=1, show_default=True, help="How many, from that one on.")
@click.option("--first", type=click.IntRange(min=0), default=0, show_default=True, help="First position of the table.")
@click.option("--positions", type=click.IntRange(min=0), default=8, show_default=True, help="Positions in the table.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Entries shown per position.")
@click.option(
    "--color/--no-color",
    default=None,
    show_default="on a terminal, unless NO_COLOR is set",
    help="Whether the text is coloured by the teacher's confidence.",
)
@cache_folder_options
def peek(
    folder: Path | None,
    split: SplitName,
    window: int,
    windows: int,
    first: int,
    positions: int,
    top: int,
    color: bool | None,
    config_path: Path | None,
    assignments: tuple[str, ...],
    run_dir: Path | None,
) -> None:
    """Show windows as text, coloured by how sure the teacher was of each token, and what it expected at some positions.

    Control characters of tokens are shown as pictures or in angle brackets; the end of a line also ends it here.

    \b
    Examples:
        tristill cache peek runs/demo/cache --split train --window 3 --positions 16
        tristill cache peek --windows 20 --positions 0 --color | less -R
    """
    from tristill.pipeline.cache_peek import peek_text
    from tristill.pipeline.terminal import wants_colour

    folder = folder or workspace_of(config_path, assignments, run_dir).named_cache
    is_coloured = wants_colour(color)
    chosen, closely = range(window, window + windows), range(first, first + positions)
    for text in peek_text(folder, split, chosen, closely, top, is_coloured=is_coloured):
        sys.stdout.write(Painted(text + "\n" * (1 + (windows > 1))))


@cache.command()
@click.option("--student", help="A student of the run or a model folder; without it, the teacher with 15% noise.")
@click.option(
    "--temperature",
    "temperatures",
    type=Number(0.01, 1000),
    multiple=True,
    default=(1.0, 2.0, 5.0),
    show_default=True,
    help="tau.",
)
@click.option(
    "--positions", type=click.IntRange(min=1), default=12_288, show_default=True, help="Positions to measure on, about."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@cache_folder_options
def fidelity(
    folder: Path | None,
    student: str | None,
    temperatures: tuple[float, ...],
    positions: int,
    as_json: bool,
    config_path: Path | None,
    assignments: tuple[str, ...],
    run_dir: Path | None,
) -> None:
    """Measure how well a cache teaches: gradients from it beside those from its teacher, on the validation split.

    \b
    Example:
        tristill cache fidelity --student no-teacher --temperature 1 --temperature 2
    """
    from tristill.pipeline.cache_fidelity import calibration_table, fidelity_table
    from tristill.stages.fidelity.cache import cache_fidelity

    workspace = workspace_of(config_path, assignments, run_dir, folder)
    folder = folder or workspace.named_cache
    named = None if student is None else workspace.student(student)
    student_folder = Path(student) if named is not None and student and not named.is_dir() else named
    teacher_folder = workspace.link_of_cache(folder).teacher
    rows = cache_fidelity(folder, teacher_folder, student_folder, temperatures, positions)
    if as_json:
        click.echo(json.dumps([row.model_dump() for row in rows], indent=2))
        return
    echo_tables(fidelity_table(rows))
    if calibration := load_manifest(folder).calibration:
        echo_tables("\n" + calibration_table(calibration))


@cache.command()
@cache_folder_options
def verify(folder: Path | None, config_path: Path | None, assignments: tuple[str, ...], run_dir: Path | None) -> None:
    """Read every byte of a cache and compare it with its checksums; exits with 1 if any is damaged.

    \b
    Example:
        tristill cache verify runs/demo/cache
    """
    from tristill.cache import verify_cache

    folder = folder or workspace_of(config_path, assignments, run_dir).named_cache
    total = sum(shard.file_bytes for shard in load_manifest(folder).shards)
    with Progress("verify", total, "bytes") as progress:
        problems = verify_cache(folder, progress.advance)
    for problem in problems:
        click.echo(visible(problem))
    if problems:
        say(f"{len(problems)} damaged files; `tristill cache repair {named_place(folder)}` mends what can be mended")
        raise click.exceptions.Exit(1)
    click.echo(f"{named_place(folder)}: every byte is as it was written")


@cache.command()
@cache_folder_options
def repair(folder: Path | None, config_path: Path | None, assignments: tuple[str, ...], run_dir: Path | None) -> None:
    """Make every byte of a cache what it was; exits with 1 if something could not be repaired.

    A manifest is made again from the shards alone. Shards that are damaged or missing are written again by the
    teacher, and only with the bytes that the manifest declares; that takes the run that made the cache, which is the
    one that the folder lies in, unless --config or --run-dir say otherwise.

    \b
    Example:
        tristill cache repair runs/demo/cache
    """
    from tristill.pipeline.cache_repair import repair_cache

    place = folder or workspace_of(config_path, assignments, run_dir).named_cache

    def run_of() -> Workspace:
        return workspace_of(config_path, assignments, run_dir, place).link_of_cache(place)

    if not repair_cache(place, run_of, click.echo):
        click.echo(f"{place}: nothing to repair, every byte is as it was written")


def _run_step(step: Step, force: bool) -> None:
    execute(step, force=force)
    if announced_ranks().is_first:
        click.echo(str(step.folder))


def _print_results(workspace: Workspace) -> None:
    from tristill.pipeline.cache_info import cache_info
    from tristill.pipeline.results import run_table

    echo_tables(run_table(workspace))
    for name in workspace.config.link_names:
        folder = workspace.link(name).cache
        if cache_fingerprint(folder) is not None:
            whose = f"cache of {name}" if name in workspace.config.stages else "cache"
            click.echo(f"{whose}: {cache_info(folder)['bytes_per_position']['on disk']:.1f} bytes/position on disk")
    say(f"students are in {workspace.run_dir / 'students'}")
