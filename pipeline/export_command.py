"""The command `export`."""

from pathlib import Path

import click

from tristill.pipeline.config import DEFAULT_STUDENT
from tristill.pipeline.options import run_options, workspace_of
from tristill.pipeline.tables import echo_tables
from tristill.stages.export.formats import ExportFormat, ternary_types


@click.command()
@click.argument("name", default=DEFAULT_STUDENT)
@click.option(
    "--format",
    "export_format",
    type=click.Choice(["hf", "bitnet", "gguf"]),
    required=True,
    help="hf: transformers, dequantised; bitnet: transformers, packed; gguf: llama.cpp.",
)
@click.option(
    "--type",
    "ternary_type",
    type=click.Choice(["tq2_0", "tq1_0", "both"]),
    default="tq2_0",
    show_default=True,
    help="Ternary blocks of a GGUF file: fast, or small.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), show_default="exports/NAME in the run folder", help="Folder or file."
)
@run_options
def export(
    name: str,
    export_format: ExportFormat,
    ternary_type: str,
    out: Path | None,
    config_path: Path | None,
    assignments: tuple[str, ...],
    run_dir: Path | None,
) -> None:
    """Write a student, by name or model folder, as another program reads it, and check it against the student there.

    Exits with 1, and keeps nothing, if what the other program computes is not what the student does.

    \b
    Examples:
        tristill export --format gguf
        tristill export no-teacher --format hf --out models/no-teacher
    """
    if export_format == "gguf" and ternary_type == "both" and out is not None:
        raise click.UsageError("--type both writes two files, and --out names one; leave one of them out")
    from tristill.pipeline.exporting import export_model

    types = ternary_types(ternary_type) if export_format == "gguf" else ()
    export_model(workspace_of(config_path, assignments, run_dir), name, export_format, types, out, echo_tables)
