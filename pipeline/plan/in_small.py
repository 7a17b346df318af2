"""The config of a run as it is rehearsed: the same in everything that a step's speed and memory depend on."""

from typing import Any

from tristill.pipeline.config import Config
from tristill.pipeline.step import Step
from tristill.pipeline.steps import Distill, Teacher
from tristill.stages.training.config import TrainingConfig

_ONCE = ("steps", "warmup_steps", "second_phase", "log_every", "checkpoint_every")


def in_small(config: Config, steps: int | None = 3, log_every: int = 1, checkpoint_every: int = 2**31) -> Config:
    """The config with so many steps in every training (None: as many as it has), with caches in the run folder alone.

    What takes a number of steps from its own settings is shortened or left out: the warm-up of the learning rate to a
    tenth, its second phase and the warm-up of quantisation altogether. Caches of other runs are over other windows
    than a rehearsal, and are left out too.
    """
    plain = config.model_dump(mode="json")
    changes = [*plain["stages"].values(), *plain["variants"].values()]
    if steps is not None:
        short = {"steps": steps, "second_phase": None, "log_every": log_every, "checkpoint_every": checkpoint_every}
        for training in (plain["teacher"]["training"], plain["distill"]["training"]):
            if training is not None:
                training.update(short | {"warmup_steps": min(training["warmup_steps"], steps // 10)})
        for change in changes:
            for key in _ONCE:
                change.get("distill", {}).get("training", {}).pop(key, None)
        for section in (plain, *changes):
            _leave_out(section.get("student", {}), "quantize", "warmup", None)
    for section in (plain, *changes):
        _leave_out(section, "cache", "dir", None)
        _leave_out(section, "cache", "url", None)
        _leave_out(section, "cache", "max_train_windows", None)
        _leave_out(section, "distill", "caches", ())
    return Config.model_validate(plain)


def _leave_out(section: dict[str, Any], table: str, key: str, default: object) -> None:
    if key in section.get(table, {}):
        section[table][key] = default


def training_of(step: Step) -> TrainingConfig | None:
    """The settings of the training that a step is; None if it is none."""
    if isinstance(step, Teacher):
        return step.config.teacher.training
    return step.config.distill.training if isinstance(step, Distill) else None
