"""Exports of a student: where they go, and that only a checked one gets its final name.

exports/NAME/hf/        hf.json        the record of an export stands beside it: what it was made of, and how far
exports/NAME/bitnet/    bitnet.json    it is from its student. What has no record is not replaced.
exports/NAME/NAME.gguf  NAME.gguf.json
"""

import glob
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from tristill.cache import open_cache
from tristill.cache.atomic import sync_folder, write_atomically
from tristill.cache.hashing import sha256_of_file
from tristill.cache.layout import COMPANION_NAMES, MANIFEST_NAME, TOKENIZER_NAME
from tristill.cache.regular_file import read_json_object
from tristill.pipeline.errors import MissingInputError, StaleError
from tristill.pipeline.provenance import locked, new_provenance
from tristill.pipeline.reading import reading, strict_inputs
from tristill.pipeline.results import text_table
from tristill.pipeline.workspace import Workspace
from tristill.stages.distill.caches import open_caches
from tristill.stages.errors import CheckpointError, ExportError
from tristill.stages.export.bitnet import write_bitnet
from tristill.stages.export.check import NUM_WINDOWS, Verdict, check_file, check_folder
from tristill.stages.export.formats import ExportFormat, TernaryType
from tristill.stages.export.gguf import write_gguf
from tristill.stages.export.hugging_face import write_hugging_face
from tristill.stages.export.packages import import_gguf
from tristill.stages.export.parity import Bounds, HeldOut, Parity
from tristill.stages.export.refusal import refuse
from tristill.stages.export.student import Student, load_student
from tristill.stages.models.checkpoint import pick_device
from tristill.stages.models.origin import model_fingerprint
from tristill.stages.progress import waiting
from tristill.stages.targets.online import OnlineSource
from tristill.stages.targets.source import Epoch, Signals, TargetSource

_RECORD_STEP = "export"
_FILES_BEFORE_RECORDS = ("config.json", "model.safetensors", TOKENIZER_NAME, *COMPANION_NAMES)
"""Of an export whose record does not name its files yet."""


@dataclass(frozen=True)
class Wanted:
    """One export: of what form, and under which name."""

    export_format: ExportFormat
    path: Path
    ternary_type: TernaryType | None = None

    @property
    def record(self) -> Path:
        """Where its record stands."""
        return self.path.with_name(f"{self.path.name}.json")


def export_model(
    workspace: Workspace,
    name: str,
    export_format: ExportFormat,
    ternary_types: tuple[TernaryType, ...],
    out: Path | None,
    echo: Callable[[str], None],
) -> None:
    """Write and check the exports; what is found is told to `echo`.

    Raises ExportError for a student that the format cannot hold, and for an export past its bounds, which is removed.
    """
    folder = workspace.model_folder(name)
    wanted = [_wanted(workspace, folder.name, export_format, kind, out) for kind in ternary_types or (None,)]
    for one in wanted:
        _refuse_to_replace(one)
        if one.path.parent.is_dir():
            with locked(one.path.parent):
                pass  # nobody exports there now: known before the work is done
    with reading(strict_inputs(folder)) as held:
        student = load_student(folder)
        held.refuse_moved({str(folder): None})  # its fingerprint is that of these weights
        if export_format == "gguf":
            import_gguf()
        refuse(student.loaded, student.tokenizer_json, export_format)
        text = held_out(workspace.link(name), student)
        for one in wanted:
            one.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(one.path.parent):
                _export(student, one, text, echo)


def held_out(link: Workspace, student: Student) -> HeldOut:
    """The first validation windows of the run's tokens, or of its cache where there are no tokens.

    Raises CheckpointError for a student with another tokenizer.
    """
    source = _source(link)
    if student.tokenizer_json.read_bytes() != source.tokenizer_path.read_bytes():
        raise CheckpointError(
            f"{student.folder}: found another tokenizer than {source.tokenizer_path}, expected the same: an export is "
            "checked on held-out windows of the run that --config or --run-dir name; give the run that the model is of"
        )
    batch = next(iter(source.batches("validation", NUM_WINDOWS, Signals(), Epoch())))
    length = min(student.context_length, batch.input_ids_BT.shape[1])
    return HeldOut(tuple(batch.input_ids_BT[:, :length]), tuple(batch.labels_BT[:, :length]))


def verdict_text(one: Wanted, verdict: Verdict) -> str:
    """What was found, as a table and a line."""
    header = ["student", "positions", "logit error, max", "mean", "KL, nats", "top-1", "perplexity", "of the export"]
    rows = [_row(verdict.reference, verdict.to_reference), _row("as trained", verdict.to_trained)]
    texts = verdict.tokenizer_texts
    ids = "its tokenizer was not run" if texts is None else f"its tokenizer made the same ids of {texts} texts"
    kind = f" {one.ternary_type}" if one.ternary_type else ""
    return "\n".join(
        [
            f"{one.export_format}{kind}, computed by {verdict.runtime}; {ids}",
            text_table([header, *rows]),
            f"bounds of the first line: {_limits(verdict.bounds)}",
            f"bounds of the second: {_limits(verdict.trained_bounds)}",
        ]
    )


def _limits(bounds: Bounds) -> str:
    limits = [f"KL at most {bounds.kl_nats:g} nats", f"top-1 at least {bounds.top1_agreement:.1%}"]
    limits += [] if bounds.max_logit_error is None else [f"logit error at most {bounds.max_logit_error:g}"]
    return ", ".join(limits)


def _row(name: str, parity: Parity) -> list[str]:
    return [
        name,
        f"{parity.positions:,}",
        f"{parity.max_logit_error:.1e}",
        f"{parity.mean_logit_error:.1e}",
        f"{parity.kl_nats:.1e}",
        f"{parity.top1_agreement:.2%}",
        f"{parity.reference_perplexity:.4f}",
        f"{parity.perplexity:.4f}",
    ]


def _export(student: Student, one: Wanted, text: HeldOut, echo: Callable[[str], None]) -> None:
    """Write in a temporary folder, check, say what was found, and move it to its place."""
    parent = one.path.parent
    for left in parent.glob(f".{glob.escape(one.path.name)}.*.partial"):  # by a kill: this process holds the folder
        if left.is_dir() and not left.is_symlink():  # a file of that form is a record's, which its next writer removes
            shutil.rmtree(left)
    with TemporaryDirectory(prefix=f".{one.path.name}.", suffix=".partial", dir=parent) as scratch:
        partial = Path(scratch) / one.path.name
        with waiting(f"export {one.path.name}"):
            verdict = _write_and_check(student, one, partial, text)
        echo(verdict_text(one, verdict))
        if verdict.broken:
            raise ExportError(
                f"{one.path}: the export does not compute what {student.folder} does: {'; '.join(verdict.broken)}; "
                f"{_what_to_do(student, one, verdict)}; nothing was kept"
            )
        record = _record(student, one, partial, verdict)
        files = sorted(path.name for path in partial.iterdir()) if partial.is_dir() else []
        earlier = _own_files(one)
        if mine := [name for name in files if name not in earlier and (one.path / name).exists()]:
            raise StaleError(
                f"{one.path / mine[0]}: found a file that no export wrote, and this one would replace it; move it, or "
                "give another --out"
            )
        size = sum((partial / name).stat().st_size for name in files) if files else partial.stat().st_size
        # While the record says `building` nothing vouches for what has the name, but it is known whose it is.
        _write_record(one, {**record, "files": sorted({*files, *earlier})}, "building")
        if one.path.is_dir():
            for name in files:
                (partial / name).replace(one.path / name)
            for name in earlier - set(files):
                (one.path / name).unlink(missing_ok=True)
            sync_folder(one.path)
        else:
            partial.replace(one.path)
        sync_folder(parent)
        _write_record(one, {**record, "files": files}, "complete")
    echo(f"{one.path}: {size / 2**20:.2f} MiB")


def _what_to_do(student: Student, one: Wanted, verdict: Verdict) -> str:
    """About an export past its bounds."""
    if not verdict.is_well_computed:
        return f"{verdict.runtime} does not compute these weights as they are: use another version or format"
    quantize = student.loaded.quantize
    if quantize is None or quantize.activations == "none":
        return (
            "activations were not rounded in training, and 8 bits there lose too much of them: train with "
            "student.quantize.activations = 'absmax-int8', or use `--format hf`, which rounds none"
        )
    return (
        f"activations were rounded to 8 bits per position in training, and `--format {one.export_format}` does "
        "otherwise: use `--format bitnet`, which rounds them as in training and holds ternary weights with a scale per "
        "matrix"
    )


def _write_and_check(student: Student, one: Wanted, partial: Path, text: HeldOut) -> Verdict:
    if one.ternary_type is not None:
        write_gguf(
            student.model,
            student.tokenizer_json,
            partial,
            one.ternary_type,
            context_length=student.context_length,
            end_of_text_id=student.end_of_text_id,
            name=student.folder.name,
            about={"tristill.student": student.fingerprint},
        )
        return check_file(student, partial, text)
    assert one.export_format != "gguf", "it has a type"
    partial.mkdir()
    write = write_bitnet if one.export_format == "bitnet" else write_hugging_face
    write(student, partial)
    return check_folder(student, one.export_format, partial, text)


def _write_record(one: Wanted, record: dict[str, Any], status: Literal["building", "complete"]) -> None:
    write_atomically(one.record, (json.dumps({**record, "status": status}, indent=2) + "\n").encode())


def _record(student: Student, one: Wanted, written: Path, verdict: Verdict) -> dict[str, Any]:
    settings = {"format": one.export_format, "type": one.ternary_type}
    record = new_provenance(_RECORD_STEP, settings, {"student": student.fingerprint})
    fingerprint = sha256_of_file(written) if written.is_file() else model_fingerprint(written)
    return {**record.model_copy(update={"fingerprint": fingerprint}).model_dump(), "verdict": asdict(verdict)}


def _known_record(one: Wanted) -> dict[str, Any] | None:
    """The record of an earlier export; None if what stands there, if anything, is none."""
    try:
        record = read_json_object(one.record)
        return record if record["step"] == _RECORD_STEP else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _own_files(one: Wanted) -> set[str]:
    """Names in the folder of an earlier export that this may replace or remove."""
    found = (_known_record(one) or {}).get("files", _FILES_BEFORE_RECORDS)
    names = {name for name in found if isinstance(name, str) and Path(name).name == name}
    return {name for name in names if not (one.path / name).is_dir()}


def _refuse_to_replace(one: Wanted) -> None:
    record = _known_record(one)
    if record is None and one.record.exists():
        raise StaleError(
            f"{one.record}: found a file that is no record of an export, and this one would have its record there; "
            "move it, or give another --out"
        )
    if one.path.exists() and (record is None or one.path.is_dir() != (one.ternary_type is None)):
        raise StaleError(
            f"{one.path}: found something that `tristill export --format {one.export_format}` did not write (it leaves "
            f"{one.record.name} beside what it writes); move it, or give another --out"
        )


def _wanted(
    workspace: Workspace, name: str, export_format: ExportFormat, kind: TernaryType | None, out: Path | None
) -> Wanted:
    folder = workspace.run_dir / "exports" / name
    if kind is None:
        return Wanted(export_format, out or folder / export_format)
    return Wanted(export_format, out or folder / (f"{name}.gguf" if kind == "TQ2_0" else f"{name}-{kind}.gguf"), kind)


def _source(link: Workspace) -> TargetSource:
    if (link.data / "data.json").is_file():
        return OnlineSource(link.data, pick_device("cpu"))
    link.refuse_outside("distill.caches")
    if (link.named_cache / MANIFEST_NAME).is_file():
        return open_caches(open_cache(link.cache), link.config.for_student(link.name).distill, pick_device("cpu"))
    raise MissingInputError(
        f"found neither tokens in {link.data} nor a cache in {link.cache}, and an export is checked on held-out text; "
        "run `tristill tokenize`, or name the run that the model is of by --config or --run-dir"
    )
