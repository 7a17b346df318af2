"""The whole config: sections from beside their owners, read from TOML, changed by --set, checked at once."""

import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Self

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from tristill.cache.atomic import write_atomically
from tristill.cache.regular_file import read_file
from tristill.cache.secrets import NO_CREDENTIALS, credentials_in, masked
from tristill.pipeline.errors import ConfigError
from tristill.stages.data.config import DataConfig
from tristill.stages.distill.config import DistillConfig, StudentConfig
from tristill.stages.dump.config import DumpConfig
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.losses.schedule import NUMBER
from tristill.stages.models.description import Shape
from tristill.stages.settings import Section
from tristill.stages.teacher.config import TeacherConfig

DEFAULT_STUDENT = "student"
_SAYS_THE_SAME = {
    "losses": ("alpha", "temperature"),
    "alpha": ("losses",),
    "temperature": ("losses",),
    "path": ("model", "training"),
    "model": ("path", "revision"),
}
"""Settings that displace others of the same table, since they say the same in another way."""
_LONGEST_SHOWN = 300
VARIANT_SECTIONS = {"student", "distill", "evaluate"}
_STAGE_SECTIONS = VARIANT_SECTIONS | {"cache"}
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class Config(Section):
    """Everything that one run folder is made from."""

    data: Annotated[DataConfig, Field(description="corpus, tokenizer and windows")] = DataConfig()
    teacher: Annotated[TeacherConfig, Field(description="the model that students learn from, trained here or given")]
    cache: Annotated[DumpConfig, Field(description="what is kept of the teacher's knowledge")] = DumpConfig()
    student: Annotated[StudentConfig, Field(description="the ternary model")] = StudentConfig()
    distill: Annotated[DistillConfig, Field(description="the student's loss and training")]
    evaluate: Annotated[EvaluateConfig, Field(description="held-out metrics")] = EvaluateConfig()
    stages: Annotated[
        dict[str, dict[str, Any]],
        Field(
            default_factory=dict,
            description="a chain of teachers, in the order written: per name, the settings of cache, student, distill "
            "and evaluate that differ. The first stage's student learns from the teacher, each next one from the "
            "student before it, and the student of this config and its variants from the last",
        ),
    ]
    variants: Annotated[
        dict[str, dict[str, Any]],
        Field(
            default_factory=dict,
            description="further students of the same cache: per name, the settings of student, distill and evaluate "
            "that differ; `distill --name NAME` trains one, `run` trains all",
        ),
    ]

    @model_validator(mode="after")
    def _quantisation_fits(self) -> Self:
        """As far as the student's shape is known: one that is given, or that of a stage's student, says so later."""
        quantize, steps = self.student.quantize, self.distill.training.steps
        problems = []
        if quantize.warmup is not None and quantize.warmup.steps >= steps:
            problems.append(
                f"warmup.steps: found {quantize.warmup.steps}, expected fewer than the {steps} steps of the training, "
                "which would end before quantisation is wholly on"
            )
        shape = self.student.model or (None if self.stages else self.teacher.model)
        if shape is not None:
            problems += quantize.misfits(shape.all_linear_shapes(vocab_size=1))
        if problems:
            raise ValueError("; ".join(f"student.quantize.{problem}" for problem in problems))
        return self

    @property
    def student_names(self) -> list[str]:
        """The default student and the variants."""
        return [DEFAULT_STUDENT, *self.variants]

    @property
    def link_names(self) -> list[str]:
        """The students of the stages and the default one, in order: each link of the chain has a cache of its own."""
        return [*self.stages, DEFAULT_STUDENT]

    @property
    def student_shape(self) -> Shape:
        """The default student's own shape, or that of its teacher. Raises CheckpointError if a given one is missing."""
        return self.for_student(DEFAULT_STUDENT).student.shape or self.teacher.shape

    def teacher_of(self, name: str) -> str | None:
        """The stage whose student teaches this one; None if the teacher does."""
        chain = [*self.stages]
        before = chain[: chain.index(name)] if name in chain else chain
        return before[-1] if before else None

    def for_student(self, name: str) -> "Config":
        """The config of one student: this one, with the changes of the stage or variant of that name, if there is one.

        A shape taken from a stage's student is filled in. A stage's cache is in a folder of its own.
        """
        plain = self.model_dump(mode="json", exclude={"stages", "variants"})
        if name in self.stages:
            plain["cache"]["dir"] = plain["cache"]["url"] = None
        merged = _merged(plain, self.stages.get(name) or self.variants.get(name, {}))
        before = self.teacher_of(name)
        if before is not None and not any(merged["student"].get(key) for key in ("model", "path")):
            merged["student"]["model"] = self.for_student(before).student.model
        return Config.model_validate(merged)


def load_config(path: Path, assignments: tuple[str, ...] = ()) -> Config:
    """The config in a TOML file after `dotted.key=value` assignments. Raises ConfigError with every problem found."""
    plain = read_toml(path, assignments)
    refuse(path, list(problems_of(plain)))
    return Config.model_validate(plain)


def read_toml(path: Path, assignments: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a TOML file says after `dotted.key=value` assignments, unchecked."""
    try:
        plain = tomllib.loads(read_file(path if path.exists() else _shipped(path)).decode("utf-8-sig"))
    except FileNotFoundError as exc:
        folder = "configs/sweeps" if path.parent.name == "sweeps" else "configs"
        names = ", ".join(sorted(f"{folder}/{found.name}" for found in _shipped(Path(folder)).glob("*.toml")))
        raise ConfigError(f"{path}: found no config there; configs that ship with tristill: {names}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{path}: cannot be read as TOML: lists or tables are nested too deeply") from exc
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path}: cannot be read as TOML: {exc}") from exc
    given: set[str] = set()
    parsed = [parse_assignment(assignment) for assignment in assignments]
    for key, value in sorted(parsed, key=lambda one: ".student.model." in f".{one[0]}"):
        set_key(
            plain, key, value, given, f"--set {masked(key)}"
        )  # fields of a shape last: it may be that of a teacher that is set too
    return plain


def _shipped(path: Path) -> Path:
    """Path of a config in the installed package, for names such as `configs/demo.toml`; other paths as they are."""
    return Path(str(files("tristill.configs"))).joinpath(*path.parts[1:]) if path.parts[:1] == ("configs",) else path


def refuse(path: Path, problems: Sequence[str]) -> None:
    """Raise ConfigError with every problem of a file, if there is any."""
    if problems:
        raise ConfigError(f"{path}: {len(problems)} problems:\n" + "\n".join(f"  {problem}" for problem in problems))


def save_config(config: Config, path: Path) -> None:
    """Write the complete config, defaults included, so that it loads again."""
    plain = config.model_dump(mode="json", exclude_none=True)
    write_atomically(path, tomli_w.dumps(plain).encode("utf-8"))


def check_student_name(name: str) -> str:
    """A name that is safe as a folder's."""
    if not _NAME.match(name) or name == "teacher":
        raise ConfigError(
            f"student name {name!r}: expected letters, digits, '.', '_' and '-', not first a sign, and not 'teacher'"
        )
    return name


def check_link_name(name: str, config: Config) -> str:
    """The name of a student that has a cache of its own."""
    if name not in config.link_names:
        raise ConfigError(
            f"--name {name}: found no stage of that name; expected one of: {', '.join(config.link_names)}, where "
            f"{DEFAULT_STUDENT!r} is the cache of the last link, which variants share"
        )
    return name


def parse_assignment(assignment: str) -> tuple[str, Any]:
    """Key and value of `dotted.key=value`; what is no TOML is a word."""
    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {masked(assignment)}: expected dotted.key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except RecursionError as exc:
        raise ConfigError(f"--set {key}: lists or tables are nested too deeply") from exc
    except ValueError:
        return key.strip(), text.strip()


def set_key(plain: dict[str, Any], key: str, value: Any, given: set[str], where: str) -> None:
    """Set one dotted key, and take away what it displaces unless that was `given` too, to which the key is added."""
    *parents, last = key.split(".")
    if parents[-2:] == ["student", "model"] and (not parents[:-2] or parents[0] in ("stages", "variants")):
        _take_shape_of_teacher(plain, parents[:-2], where)
    table = plain
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: {parent} is a value, not a table")
    for other in displaced({last}):
        path = ".".join([*parents, other])
        if not any(one == path or one.startswith(f"{path}.") for one in given):
            table.pop(other, None)
    table[last] = value
    given.add(key)


def _take_shape_of_teacher(plain: dict[str, Any], owner: Sequence[str], where: str) -> None:
    """Fill in an absent student.model, of which one field is to be set, with the shape of the student's teacher.

    owner: nothing, or the stage or variant whose student it is. The teacher is the run's, or the student of the last
    stage before it that has a shape of its own. Raises ConfigError if a given teacher has it, outside of the config.
    """
    if any({"model", "path"} & table_at(plain, [*at, "student"]).keys() for at in ((), owner)):
        return
    stages = list(table_at(plain, ["stages"]))
    before = stages[: stages.index(owner[1])] if owner and owner[1] in stages else stages
    teachers = [table_at(plain, ["teacher"]), *(table_at(plain, ["stages", name, "student"]) for name in before)]
    if shapes := [teacher["model"] for teacher in teachers if isinstance(teacher.get("model"), dict)]:
        set_key(plain, ".".join([*owner, "student.model"]), dict(shapes[-1]), set(), where)
    elif path := table_at(plain, ["teacher"]).get("path"):
        raise ConfigError(
            f"{where}: changes one field of the teacher's shape, and that of a given teacher ({path}) is not in the "
            "config; give student.model whole, or student.path"
        )


def table_at(plain: Any, keys: Sequence[str]) -> dict[str, Any]:
    """The table at these keys of nested ones; empty where there is none."""
    for key in keys:
        plain = plain.get(key) if isinstance(plain, dict) else None
    return plain if isinstance(plain, dict) else {}


def problems_of(plain: dict[str, Any]) -> Iterator[str]:
    """Every problem of the config itself and of each stage and variant merged into it, as `path: what`."""
    if found := list(_credentials(plain)):
        yield from found  # alone: other problems show what they found
        return
    own = list(_validation_problems(plain))
    yield from own
    base = {} if own else Config.model_validate(plain).model_dump(mode="json", exclude={"stages", "variants"})
    taken = {DEFAULT_STUDENT, "teacher"}
    for table, sections, why in (
        ("stages", _STAGE_SECTIONS, "since a run has one corpus, and one teacher to begin with"),
        ("variants", VARIANT_SECTIONS, "since variants share one cache"),
    ):
        students = plain.get(table)
        for name, changes in students.items() if isinstance(students, dict) else ():
            where = f"{table}.{name}"
            if not _NAME.match(name) or name in taken:
                yield f"{where}: expected another name: letters, digits, '.', '_', '-', none of {sorted(taken)}"
            elif not isinstance(changes, dict) or changes.keys() - sections:
                yield f"{where}: expected tables {sorted(sections)} only, {why}"
            elif not own:
                yield from (f"{where}.{problem}" for problem in _validation_problems(_merged(base, changes)))
            taken.add(name)
    yield from _shared_caches(plain)


def _credentials(plain: dict[str, Any]) -> Iterator[str]:
    """Keys of the config, and of each stage and variant, that hold a credential."""
    chosen = {
        f"{table}.{name}": one for table in ("stages", "variants") for name, one in table_at(plain, [table]).items()
    }
    common = {key: value for key, value in plain.items() if key not in ("stages", "variants")}
    for where, table in {"": common, **chosen}.items():
        yield from (f"{masked(key)}: {NO_CREDENTIALS}" for key in credentials_in(table, where))


def _shared_caches(plain: dict[str, Any]) -> Iterator[str]:
    """Folders and URLs that two links of the chain name for their caches."""
    stages = plain.get("stages")
    tables = {f"stages.{name}": stage for name, stage in stages.items()} if isinstance(stages, dict) else {}
    seen: dict[str, str] = {}
    for where, table in {**tables, "": plain}.items():
        cache = table.get("cache") if isinstance(table, dict) else None
        for name, what in (("dir", "folder"), ("url", "URL")):
            place = cache.get(name) if isinstance(cache, dict) else None
            key = f"{where}.cache.{name}".lstrip(".")
            if place is not None and seen.setdefault(str(place), key) != key:
                of = seen[str(place)]
                yield f"{key}: found the {what} of {of}; expected one of its own, as their teachers differ"


def _validation_problems(plain: dict[str, Any]) -> Iterator[str]:
    try:
        Config.model_validate(plain)
    except ValidationError as exc:
        for problem in exc.errors(include_url=False):
            is_unknown_key = problem["type"] == "extra_forbidden"
            keys, siblings, kinds = _locate(problem["loc"], ends_in_key=is_unknown_key)
            path = ".".join(keys)
            if is_unknown_key:
                near = difflib.get_close_matches(keys[-1], siblings, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(siblings)}"
                yield f"{path}: unknown key; {hint}"
            elif problem["type"] == "union_tag_not_found":
                yield f"{path}.kind: is missing; expected one of: {', '.join(kinds)}"
            elif problem["type"] == "missing":
                yield f"{path}: is missing; it has no default"
            else:
                message = problem["msg"].removeprefix("Value error, ")
                found = problem["input"]
                suffix = "" if isinstance(found, dict | BaseModel) else f"; found {shown(found)}"
                yield ": ".join([*([path] if path else []), message + suffix])  # of the whole config: says where itself


def shown(value: Any) -> str:
    """A value as in Python, cut short; an integer of thousands of digits has no such text."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} too large to show"
    text = masked(text)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _locate(location: tuple[int | str, ...], *, ends_in_key: bool = False) -> tuple[list[str], list[str], list[str]]:
    """(keys of a problem as written in TOML, keys known beside it, kinds of table that may stand there).

    Pydantic's tags of unions are left out of the keys; ends_in_key: the last part is none, whatever it looks like.
    """
    models: list[type[BaseModel]] = [Config]
    keys: list[str] = []
    siblings: list[str] = []
    for number, part in enumerate(location, start=1):
        is_key = ends_in_key and number == len(location)
        if not isinstance(part, int) and "[" in part and not is_key:  # one of several types that may stand there
            continue
        if isinstance(part, int):  # of a list
            keys.append(str(part))
            continue
        tagged = [model for model in models if kind_of(model) == part]
        if (tagged or part == NUMBER) and not is_key and not any(part in model.model_fields for model in models):
            models = tagged
            continue
        siblings = sorted({name for model in models for name in model.model_fields})
        keys.append(part)
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [found for field in fields for found in section_types(field.annotation)]
    return keys, siblings, [kind for model in models if (kind := kind_of(model))]


def kind_of(model: type[BaseModel]) -> str | None:
    """The `kind` by which a table is told from others that may stand in its place; None if there are none."""
    field = model.model_fields.get("kind")
    choices = typing.get_args(field.annotation) if field else ()
    return str(choices[0]) if choices else None


def section_types(annotation: Any) -> list[type[BaseModel]]:
    """The config sections that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated, tuple):
        return [found for part in typing.get_args(annotation) for found in section_types(part)]
    return []


def displaced(keys: Iterable[str]) -> set[str]:
    """What settings that are given take the place of, since they say the same in another way."""
    return {other for key in keys for other in _SAYS_THE_SAME.get(key, ())}


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, tables merged key by key.

    A table of another kind takes the other's place, and so do a map of layers, and one way to say the loss another.
    """
    if "kind" in changes and changes["kind"] != base.get("kind"):
        return dict(changes)
    away = displaced(changes)
    merged = {key: value for key, value in base.items() if key not in away}
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and key != "layers":
            merged[key] = _merged(old, value)
        else:
            merged[key] = value
    return merged
