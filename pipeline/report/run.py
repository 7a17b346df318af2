"""A run as it lies on disk: its models with what was logged of them, finished or not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tristill.cache.regular_file import parsed_json
from tristill.pipeline.errors import MissingInputError, StaleError
from tristill.pipeline.provenance import Provenance, read_provenance
from tristill.pipeline.report.section import Entry
from tristill.pipeline.results import has_summary, loss_text, read_summary
from tristill.pipeline.units import number
from tristill.pipeline.workspace import Workspace
from tristill.stages.models.description import CONFIG_NAME
from tristill.stages.training.watch import HELD_OUT, PartingNote

MAX_STUDENTS = 6
"""Students that are drawn over one another; more would not be told apart."""
TEACHER = "teacher"
_OF_LABELS = ("loss", "terms", "grad_norm", "gradient_share")


@dataclass(frozen=True)
class Model:
    """A teacher or student. summary: empty while it is not finished. log: the records of `metrics.jsonl`."""

    name: str
    folder: Path
    entry: Entry
    summary: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    record: Provenance | None
    taught_by: str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it was trained, evaluated and saved."""
        return bool(self.summary)

    @property
    def has_weights(self) -> bool:
        """Whether there is a model to run."""
        return (self.folder / CONFIG_NAME).is_file()

    @property
    def validation(self) -> Mapping[str, Any]:
        """Held-out metrics."""
        return mapping(self.summary.get("validation"))

    @property
    def train(self) -> Mapping[str, Any]:
        """What its training took; empty of a teacher that was given."""
        return mapping(self.summary.get("train"))

    @property
    def shape(self) -> Mapping[str, Any]:
        """Its parameters and packed bytes; of a student."""
        return mapping(self.summary.get("model"))

    @property
    def perplexity(self) -> float | None:
        """On held-out text."""
        return number(self.validation.get("perplexity"))

    @property
    def loss(self) -> str:
        """Its terms on distributions in a few words."""
        settings = mapping(self.record.settings.get("distill")) if self.record else {}
        return loss_text(settings) if "alpha" in settings else "-"

    def curve(self, *keys: str) -> tuple[list[float], list[float]]:
        """(positions trained on, the number logged under these keys), where there is one.

        A batch of chats may have no position that counts: its loss is 0 and says nothing, as do the terms of it.
        """
        records = [record for record in self.log if keys[0] not in _OF_LABELS or record.get("loss") != 0]
        found = [(number(record.get("positions")), number(_at(record, keys))) for record in records]
        known = [(at, value) for at, value in found if at is not None and value is not None]
        return [at for at, _ in known], [value for _, value in known]

    @property
    def held_out(self) -> tuple[list[float], list[float]]:
        """(positions trained on, loss of a sample of held-out text), where a training was to record it."""
        return self.curve(HELD_OUT, "loss_nats")

    @property
    def parting(self) -> str:
        """A sentence on where train and held-out loss part; empty where they do not."""
        note = PartingNote(())
        found = next((parting for record in self.log if (parting := note.add(record))), None)
        return f" {self.name}: {found.text}." if found else ""

    def names_in_log(self, key: str) -> list[str]:
        """Names of what was logged under a key, in the order of their first appearance."""
        return list(dict.fromkeys(name for record in self.log for name in mapping(record.get(key))))


@dataclass(frozen=True)
class Run:
    """All models of a run: students of the config first, in its order, then any others."""

    workspace: Workspace
    teacher: Model
    students: tuple[Model, ...]

    @property
    def shown(self) -> tuple[Model, ...]:
        """The students that are drawn."""
        return self.students[:MAX_STUDENTS]

    @property
    def models(self) -> tuple[Model, ...]:
        """The teacher and the students that are drawn."""
        return (self.teacher, *self.shown)

    @property
    def left_out(self) -> str:
        """A sentence on the students that are not drawn; empty if all are."""
        names = [student.name for student in self.students[MAX_STUDENTS:]]
        return f"Plots show {MAX_STUDENTS} students and leave out {', '.join(names)}." if names else ""

    @property
    def best(self) -> Model | None:
        """The student of the lowest held-out perplexity."""
        finished = [student for student in self.students if student.perplexity is not None]
        return min(finished, key=lambda student: student.perplexity or 0.0, default=None)


def read_run(workspace: Workspace) -> Run:
    """What is there now."""
    teacher = _read_model(TEACHER, workspace.run_dir / TEACHER, Entry(TEACHER, "ink"), None)
    found = [path.name for path in sorted((workspace.run_dir / "students").glob("*")) if _has_anything(path)]
    configured = [name for name in [*workspace.config.stages, *workspace.config.student_names] if name in found]
    names = [*configured, *(name for name in found if name not in configured)]
    students = []
    for place, name in enumerate(names):
        entry = Entry(name, f"s{place % 8 + 1}", is_dashed=place % 8 >= 4)
        taught_by = workspace.config.teacher_of(name) or TEACHER
        student = _read_model(name, workspace.student(name), entry, taught_by)
        unfinished = replace(entry, label=f"{name} (not finished)")
        students.append(student if student.is_finished else replace(student, entry=unfinished))
    return Run(workspace, teacher, tuple(students))


def mapping(value: Any) -> Mapping[str, Any]:
    """The table that a file holds there, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def _read_model(name: str, folder: Path, entry: Entry, taught_by: str | None) -> Model:
    try:
        summary = mapping(read_summary(folder)) if has_summary(folder) else {}
    except MissingInputError:
        summary = {}  # shown as not finished
    try:
        record = read_provenance(folder)
    except StaleError:
        record = None  # shown without it
    return Model(name, folder, entry, summary, tuple(_records(folder / "metrics.jsonl")), record, taught_by)


def _has_anything(folder: Path) -> bool:
    return has_summary(folder) or (folder / "metrics.jsonl").is_file()


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    """Whole lines that hold a record; a training that goes on, or was killed, may have left half of one."""
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = parsed_json(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _at(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    found: Any = record
    for key in keys:
        found = mapping(found).get(key)
    return found
