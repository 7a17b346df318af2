"""The top of the page: the run in a few numbers, and where all of it comes from."""

import tomllib
from collections.abc import Iterator

import tomli_w

from cache import CacheError
from pipeline.errors import StaleError
from pipeline.report.cache import cache_size
from pipeline.report.run import Model, Run
from pipeline.report.section import Block, Listing, Table, Tile
from pipeline.report.teacher import precision
from pipeline.step import Step
from pipeline.steps import DumpLogits, all_steps
from pipeline.units import bytes_text, cell, count_text, number

_BYTES_PER_FP32 = 4


def tiles(run: Run) -> list[Tile]:
    """Teacher, best student, distance, cache and packed size; what is not there yet is not shown."""
    return [tile for tile in _tiles(run) if tile is not None]


def _tiles(run: Run) -> Iterator[Tile | None]:
    teacher, best = run.teacher, run.best
    parameters = number(teacher.summary.get("parameters"))
    if teacher.perplexity is not None:
        known = [f"{count_text(parameters)} parameters"] if parameters else []
        note = f"perplexity; {', '.join([*known, precision(teacher)])}"
        yield Tile("Teacher", f"{teacher.perplexity:.2f}", note)
    if best is not None:
        yield _best_tile(best, teacher)
        nats = number(best.validation.get("kl_to_teacher_nats"))
        if nats is not None:
            agreement = cell(best.validation.get("top1_agreement"), "{:.1%}")
            yield Tile("KL to the teacher", f"{nats:.3f} nats", f"{best.name}; the same first choice at {agreement}")
    if size := cache_size(run.workspace.cache):
        yield Tile("Cache", f"{size[0]:.1f} bytes", f"per position; {bytes_text(size[1])} on disk")
    packed = number(best.shape.get("packed_bytes")) if best else None
    weights = number(best.shape.get("parameters")) if best else None
    if packed and weights:
        share = packed / (_BYTES_PER_FP32 * weights)
        yield Tile("Packed student", bytes_text(packed), f"{share:.0%} of the same weights in FP32")


def _best_tile(best: Model, teacher: Model) -> Tile:
    perplexity = best.perplexity or 0.0
    ratio = f", {perplexity / teacher.perplexity:.2f} times the teacher's" if teacher.perplexity else ""
    return Tile("Best student", f"{perplexity:.2f}", f"perplexity of {best.name}{ratio}")


def provenance(run: Run) -> list[Block]:
    """Fingerprints, commands and versions of every step, and the config; nothing of them changes by being copied."""
    rows, versions = [], {}
    for step in all_steps(run.workspace):
        record = _record(step)
        if record is not None:
            rows.append((step.label, *record))
            versions.update(_versions(step))
    blocks: list[Block] = []
    if rows:
        blocks.append(Table(("step", "fingerprint", "command"), rows, "What each step made, and how.", num_left=3))
    if versions:
        blocks.append(Table(("package", "version"), sorted(versions.items()), "Versions that made it.", num_left=2))
    config = run.workspace.config.model_dump(mode="json", exclude_none=True)
    blocks.append(Listing(tomli_w.dumps(tomllib.loads(tomli_w.dumps(config)))))
    return blocks


def _record(step: Step) -> tuple[str, str] | None:
    try:
        record, fingerprint = step.provenance(), step.fingerprint()
    except (StaleError, CacheError):
        return None  # its own section says what is wrong with it
    if record is None and not (isinstance(step, DumpLogits) and fingerprint):
        return None
    return fingerprint or "not finished", record.command if record else "made elsewhere"


def _versions(step: Step) -> dict[str, str]:
    record = step.provenance()
    return dict(record.versions) if record else {}
