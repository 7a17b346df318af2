"""Settings of a sweep: `configs/sweeps/NAME.toml`."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from tristill.cache.secrets import NO_CREDENTIALS, holds_password
from tristill.pipeline.config import parse_assignment, read_toml, refuse, shown
from tristill.pipeline.errors import ConfigError
from tristill.stages.settings import Section

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_HIGHER_IS_BETTER = {"validation.top1_agreement", "validation.acceptance_rate"}
SEED = "distill.training.seed"


class Range(Section):
    """Numbers between two bounds, which belong to it."""

    low: Annotated[float, Field(description="smallest value")]
    high: Annotated[float, Field(description="largest value")]
    step: Annotated[float | None, Field(gt=0, description="distance of values from low on; a grid needs it")] = None
    log: Annotated[bool, Field(description="draw the logarithm uniformly")] = False
    kind: Annotated[Literal["float", "int"], Field(description="what values are; the step of int is 1 if none")] = (
        "float"
    )

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"expected low below high, found {self.low:g} and {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs a low above zero and no step")
        if self.kind == "int" and any(x is not None and x != int(x) for x in (self.low, self.high, self.step)):
            raise ValueError("kind = 'int' needs whole numbers as low, high and step")
        return self

    def values(self) -> list[float] | list[int] | None:
        """All of them, ascending; None where they are not stepped."""
        step = self.step or (1 if self.kind == "int" and not self.log else None)
        if step is None:
            return None
        count = int((self.high - self.low) / step + 1e-9) + 1
        found = [round(self.low + place * step, 12) for place in range(count)]
        return [int(value) for value in found] if self.kind == "int" else found

    def some(self) -> list[float] | list[int]:
        """Values to try a config with: both ends and one between them."""
        if self.kind == "int":
            return [int(self.low), int(self.high)]
        return [self.low, self.high, self.low + (self.high - self.low) * 0.618]


class Grid(Section):
    """Every combination of the values."""

    kind: Annotated[Literal["grid"], Field(description="this search")] = "grid"


class RandomSearch(Section):
    """Combinations drawn at random, each a function of the seed and its number alone."""

    kind: Annotated[Literal["random"], Field(description="this search")]
    trials: Annotated[int, Field(ge=1, description="combinations to draw; one that is drawn again is trained once")]
    seed: Annotated[int, Field(ge=0, description="of the draws")] = 0


class TpeSearch(Section):
    """Combinations drawn where earlier ones did well: tree-structured Parzen estimators (Bergstra et al. 2011)."""

    kind: Annotated[Literal["tpe"], Field(description="this search")]
    trials: Annotated[int, Field(ge=1, description="combinations to draw; one that is drawn again is trained once")]
    startup_trials: Annotated[int, Field(ge=1, description="students before which it draws at random")] = 10
    seed: Annotated[int, Field(ge=0, description="of the draws")] = 0


class MedianPruning(Section):
    """Ends students that are, at their best so far, worse than the median of the finished ones at the same step."""

    kind: Annotated[Literal["median"], Field(description="this pruning")]
    every: Annotated[int, Field(ge=1, description="steps between looks at the metric")]
    windows: Annotated[int, Field(ge=1, description="validation windows of a look, the first ones")] = 16
    startup_trials: Annotated[int, Field(ge=1, description="students that are finished before any is ended")] = 5
    warmup_steps: Annotated[int, Field(ge=0, description="steps before which none is ended")] = 0


class HalvingPruning(Section):
    """Keeps one of `factor` students at min_steps, factor * min_steps, .. (ASHA: Li et al. 2020, arXiv 1810.05934)."""

    kind: Annotated[Literal["successive_halving"], Field(description="this pruning")]
    every: Annotated[int, Field(ge=1, description="steps between looks at the metric")]
    windows: Annotated[int, Field(ge=1, description="validation windows of a look, the first ones")] = 16
    min_steps: Annotated[int, Field(ge=1, description="steps of the first choice")]
    factor: Annotated[int, Field(ge=2, description="of so many one is kept, and trains so many times as long")] = 4


def _is_range(value: Any) -> str:
    return "range" if isinstance(value, dict | Range) else "list"


Varied = Annotated[
    Annotated[Range, Tag("range")] | Annotated[tuple[Any, ...], Tag("list"), Field(min_length=1)],
    Discriminator(_is_range),
]
_TAGS = {"range", "list", "grid", "random", "tpe", "median", "successive_halving"}


class SweepConfig(Section):
    """Many students of one cache."""

    base: Annotated[Path, Field(description="config of the run whose cache all students read")]
    run_dir: Annotated[Path | None, Field(description="folder of that run; none is runs/<name of base>")] = None
    vary: Annotated[
        dict[str, Varied],
        Field(
            description="keys of student, distill and evaluate in the base's config, each with a list of values or a "
            "range { low, high, step, log, kind }"
        ),
    ]
    search: Annotated[
        Grid | RandomSearch | TpeSearch, Field(discriminator="kind", description="which combinations are trained")
    ] = Grid()
    pruning: Annotated[
        MedianPruning | HalvingPruning | None,
        Field(discriminator="kind", description="ends students early that do badly; none lets all finish"),
    ] = None
    metric: Annotated[
        Literal[
            "validation.perplexity",
            "validation.loss_nats",
            "validation.bits_per_byte",
            "validation.expected_calibration_error",
            "validation.kl_to_teacher_nats",
            "validation.top1_agreement",
            "validation.acceptance_rate",
        ],
        Field(description="what of a student's summary.json is best where it is smallest; of the last two, largest"),
    ] = "validation.perplexity"
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**63)], ...],
        Field(description=f"each combination is trained with each of these as {SEED}; empty leaves that as it is"),
    ] = ()
    storage: Annotated[
        str | None,
        Field(
            description="Optuna storage URL, shared by many processes or machines; $NAME stands for a variable of the "
            "environment. None is a SQLite file in the sweep's folder"
        ),
    ] = None

    @field_validator("vary", mode="before")
    @classmethod
    def _by_dotted_key(cls, vary: Any) -> Any:
        return dict(_leaves(vary, "")) if isinstance(vary, dict) else vary

    @field_validator("vary")
    @classmethod
    def _varies(cls, vary: dict[str, Varied]) -> dict[str, Varied]:
        if not vary:
            raise ValueError("expected at least one key")
        return vary

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("expected seeds that differ")
        return seeds

    @field_validator("storage")
    @classmethod
    def _storage_holds_no_password(cls, storage: str | None) -> str | None:
        if storage is not None and holds_password(storage):
            raise ValueError(f"{NO_CREDENTIALS}; here, write $NAME for a variable of the environment")
        return storage

    @property
    def metric_name(self) -> str:
        """The metric within `validation`."""
        return self.metric.removeprefix("validation.")

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """What is best."""
        return "maximize" if self.metric in _HIGHER_IS_BETTER else "minimize"


def load_sweep(path: Path, assignments: tuple[str, ...]) -> tuple[SweepConfig, tuple[str, ...]]:
    """The sweep in a TOML file, and the assignments among those given that are to its base.

    Raises ConfigError with every problem found.
    """
    if not _NAME.match(path.stem):
        raise ConfigError(f"{path}: a sweep is named after its file: expected letters, digits, '.', '_' and '-'")
    own = tuple(one for one in assignments if parse_assignment(one)[0].split(".")[0] in SweepConfig.model_fields)
    plain = read_toml(path, own)
    try:
        sweep = SweepConfig.model_validate(plain)
    except ValidationError as exc:
        refuse(path, list(_problems(exc)))
        raise
    return sweep, tuple(one for one in assignments if one not in own)


def _leaves(table: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Keys as dotted ones, whether they were written so or as tables; a table with low or high is a range."""
    for name, value in table.items():
        key = f"{path}.{name}".lstrip(".")
        if isinstance(value, dict) and not value.keys() & {"low", "high"}:
            yield from _leaves(value, key)
        else:
            yield key, value


def _problems(error: ValidationError) -> Iterator[str]:
    sections = (SweepConfig, Range, Grid, RandomSearch, TpeSearch, MedianPruning, HalvingPruning)
    known = sorted({name for section in sections for name in section.model_fields})
    for problem in error.errors(include_url=False):
        location, found = [str(part) for part in problem["loc"]], problem["input"]
        unknown = [location.pop()] if problem["type"] == "extra_forbidden" else []  # no tag, whatever it looks like
        path = ".".join([*(part for part in location if part not in _TAGS), *unknown])
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            yield f"{path}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
        elif problem["type"] == "missing":
            yield f"{path}: is missing; it has no default"
        elif problem["type"] == "union_tag_not_found":
            yield f"{path}.kind: is missing"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{path}: {message}" + ("" if isinstance(found, dict) else f"; found {shown(found)}")
