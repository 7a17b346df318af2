"""A student of a sweep: the step `distill` in a folder of the sweep, on the cache alone."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tristill.pipeline.config import (
    DEFAULT_STUDENT,
    VARIANT_SECTIONS,
    Config,
    displaced,
    problems_of,
    read_toml,
    set_key,
)
from tristill.pipeline.options import arguments_of, workspace_of
from tristill.pipeline.step import Step
from tristill.pipeline.steps import Distill
from tristill.pipeline.sweep.config import SweepConfig
from tristill.pipeline.sweep.points import Point, folder_name
from tristill.pipeline.workspace import RUN_CONFIG_NAME, Workspace
from tristill.stages.models.description import ModelConfig

DEFAULT_SWEEP = Path("configs/sweeps/demo.toml")


class Base:
    """The run that a sweep varies, and the sweep's own folder in it."""

    def __init__(
        self, sweep: SweepConfig, path: Path | None, assignments: tuple[str, ...], run_dir: Path | None
    ) -> None:
        """`path`: of the sweep's file; None for the default one, whose base gives way to the config of the run folder.

        Raises ConfigError with every problem of the base's config.
        """
        own = run_dir / RUN_CONFIG_NAME if run_dir is not None and path is None else None
        self.path = own if own is not None and own.is_file() else sweep.base
        self.workspace = workspace_of(None if self.path == own else self.path, assignments, run_dir or sweep.run_dir)
        self.workspace.refuse_outside("cache.dir", "cache.url", "student", "distill")
        self.run_dir = self.workspace.run_dir
        self.arguments = arguments_of(self.workspace, self.path, assignments)
        self.sweep_path = path = path or DEFAULT_SWEEP
        self.name = path.stem
        self.folder = self.run_dir / "sweeps" / self.name
        self._plain = read_toml(self.path, assignments)
        self._plain.pop("variants", None)
        student = self._plain.setdefault("student", {})
        if any(key.startswith("student.model.") for key in sweep.vary) and "model" not in student:
            shape = self.workspace.config.student_shape  # what one key of it is varied from
            if isinstance(shape, ModelConfig):  # else the check of the sweep says so
                student["model"] = shape.model_dump(mode="json", exclude_none=True)

    def plain(self, parameters: Point) -> dict[str, Any]:
        """The config of a student with these parameters, unchecked."""
        plain = copy.deepcopy(self._plain)
        given: set[str] = set()
        for key, value in parameters.items():
            set_key(plain, key, value, given, f"vary.{key}")
        if isinstance(distill := plain.get("distill"), dict):
            distill["targets"] = "cached"
        return plain

    def problems(self, parameters: Point) -> list[str]:
        """What is wrong with these parameters, each by its dotted path."""
        return list(problems_of(self.plain(parameters)))

    def fixed_settings(self, varied: Iterable[str]) -> dict[str, Any]:
        """What all students have in common of what their numbers depend on."""
        config = self.student({}).config
        plain = {name: getattr(config, name).numbers() for name in sorted(VARIANT_SECTIONS)}
        for key in varied:
            *parents, last = key.split(".")
            table: Any = plain
            for parent in parents:
                table = table.get(parent) if isinstance(table, dict) else None
            for name in {last} | displaced({last}) if isinstance(table, dict) else ():
                table.pop(name, None)
        return plain

    def student(self, parameters: Point) -> "SweptStudent":
        """The step of a student whose parameters have no problem."""
        config = Config.model_validate(self.plain(parameters))
        workspace = replace(self.workspace, config=config)
        return SweptStudent(workspace, self.folder / "students" / folder_name(parameters))


class SweptStudent(Distill):
    """As `tristill distill` trains it with the same settings, bit for bit."""

    command = "sweep"

    def __init__(self, workspace: Workspace, folder: Path) -> None:
        super().__init__(workspace, DEFAULT_STUDENT)
        self._folder = folder

    @property
    def label(self) -> str:
        """The command."""
        return self.command

    @property
    def folder(self) -> Path:
        """Its folder in the sweep's."""
        return self._folder

    @property
    def requires(self) -> dict[str, Step]:
        """Nothing that is not checked of the whole sweep."""
        return {}

    def save_config(self) -> None:
        """Nothing: the run's config is the base's, and the student's settings are in its record."""
