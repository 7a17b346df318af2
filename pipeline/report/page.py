"""Writes `report.html`: one file that needs nothing else."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from tristill.cache.atomic import write_atomically
from tristill.pipeline.errors import MissingInputError, PipelineError
from tristill.pipeline.report.cache import cache_section
from tristill.pipeline.report.costs import costs_section
from tristill.pipeline.report.data import data_section
from tristill.pipeline.report.evaluation import evaluation_section
from tristill.pipeline.report.generations import generations_section
from tristill.pipeline.report.plan import plan_section
from tristill.pipeline.report.quantizer import quantizer_section
from tristill.pipeline.report.run import Run, read_run
from tristill.pipeline.report.section import Block, Figure, Section, Table, Tile
from tristill.pipeline.report.students import students_section
from tristill.pipeline.report.summary import about, provenance, tiles
from tristill.pipeline.report.sweeps import sweeps_section
from tristill.pipeline.report.teacher import teacher_section
from tristill.pipeline.workspace import Workspace
from tristill.stages.visible import visible_markup

REPORT_NAME = "report.html"


def write_report(workspace: Workspace, *, has_samples: bool = True) -> Path:
    """The run's page, in its folder. The same run gives the same bytes.

    Raises MissingInputError if there is no run, PipelineError if what draws is not installed.
    """
    if not workspace.run_dir.is_dir():
        raise MissingInputError(
            f"{workspace.run_dir}: found no run there; run `tristill run`, or name one with --run-dir"
        )
    if absent := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        raise PipelineError(
            f"{' and '.join(absent)}: not installed, but the report needs it; run `pip install -e '.[report]'`"
        )
    run = read_run(workspace)
    name = workspace.run_dir.resolve().name
    sections = list(_sections(run, has_samples=has_samples))
    html = visible_markup(render(name, tiles(run), sections, provenance(run), about(run)))
    path = workspace.run_dir / REPORT_NAME
    write_atomically(path, html.encode("utf-8"))
    return path


def render(
    name: str,
    tiles: Sequence[Tile],
    sections: Sequence[Section],
    provenance: Sequence[Block],
    about: Sequence[tuple[str, str]] = (),
) -> str:
    """The page. Everything but the drawings is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    return template.render(name=name, about=about, tiles=tiles, sections=sections, provenance=provenance, rows=_rows)


def _sections(run: Run, *, has_samples: bool) -> Iterator[Section]:
    """The story, in its order."""
    yield data_section(run)
    yield teacher_section(run)
    yield cache_section(run)
    yield students_section(run)
    if health := quantizer_section(run):
        yield health
    yield evaluation_section(run)
    if has_samples:
        yield generations_section(run)
    if sweeps := sweeps_section(run):
        yield sweeps
    yield costs_section(run)
    yield plan_section(run)


def _rows(blocks: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """Blocks as they stand below one another: neighbouring `cards` share a row where there is room."""
    return [(kind, list(found)) for kind, found in groupby(blocks, key=_row_of)]


def _row_of(block: Block) -> str:
    is_card = not block.is_wide if isinstance(block, Figure) else isinstance(block, Table) and bool(block.title)
    return "cards" if is_card else "one"
