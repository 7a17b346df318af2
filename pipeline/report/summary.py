"""The top of the page: the run in a few numbers, and where all of it comes from."""

import tomllib
from collections.abc import Iterator

import tomli_w

from tristill.cache import CacheError
from tristill.pipeline.errors import StaleError
from tristill.pipeline.provenance import Provenance
from tristill.pipeline.report.cache import cache_size
from tristill.pipeline.report.run import Model, Run
from tristill.pipeline.report.section import Block, Listing, Table, Tile
from tristill.pipeline.report.teacher import precision
from tristill.pipeline.step import Step
from tristill.pipeline.steps import DumpLogits, all_steps
from tristill.pipeline.units import bytes_text, count_text, number
from tristill.stages.models.origin import is_hub_name

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
            agreement = number(best.validation.get("top1_agreement"))  # not known of draws
            same = f"; the same first choice at {agreement:.1%}" if agreement is not None else ""
            yield Tile("KL to the teacher", f"{nats:.3f} nats", f"{best.name}{same}")
    if size := cache_size(run.workspace.cache):
        yield Tile("Cache", f"{size[0]:.1f} bytes", f"per position; {bytes_text(size[1])} on disk")
    packed = number(best.shape.get("packed_bytes")) if best else None
    weights = number(best.shape.get("parameters")) if best else None
    if packed and weights:
        share = packed / (_BYTES_PER_FP32 * weights)
        yield Tile("Packed student", bytes_text(packed), f"{share:.0%} of the same weights in FP32")


def about(run: Run) -> list[tuple[str, str]]:
    """(label, text) of whose run it is: the teacher, the machine, the code and the date."""
    models = (run.teacher, *run.students)
    records = [record for model in models if (record := model.record) is not None]
    known: dict[str, list[str]] = {
        "Teacher": [_teacher_name(run)],
        "Hardware": [_hardware(record) for record in records if record.machine],
        "Threads": [
            f"{threads:.0f}" for one in (run.teacher, *run.students) if (threads := number(one.train.get("threads")))
        ],
        "tristill": [_version(record) for record in records if "tristill" in record.versions],
        "Finished": [max((_date(record) for record in records), default="")],
    }
    return [(label, "; ".join(dict.fromkeys(texts))) for label, texts in known.items() if any(texts)]


def _teacher_name(run: Run) -> str:
    """A hub name, a folder's name, or that it was trained here."""
    given = run.workspace.config.teacher.path
    if given is None:
        return "trained in this run" if run.teacher.is_finished else ""
    return str(given) if is_hub_name(given) else f"{given.name} (given)"


def _hardware(record: Provenance) -> str:
    machine = record.machine
    parts = [machine.get("accelerators", ""), machine.get("processor", ""), f"{machine.get('cores', '?')} cores"]
    return ", ".join(part for part in parts if part)


def _date(record: Provenance) -> str:
    """To the minute; empty where it is not known."""
    return f"{record.finished_at[:16].replace('T', ' ')} UTC" if record.finished_at else ""


def _version(record: Provenance) -> str:
    commit = f", commit {record.commit}" if record.commit else ""
    return f"{record.versions['tristill']}{commit}"


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
