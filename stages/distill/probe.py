"""What a step takes from a cache, and what the same step takes with the teacher forwarded."""

import math
import time

import torch
from torch import nn

from tristill.stages.distill.config import DistillConfig, StudentConfig
from tristill.stages.distill.objective import Objective
from tristill.stages.models.checkpoint import new_model
from tristill.stages.models.description import Shape
from tristill.stages.targets.source import TargetSource, endless_batches
from tristill.stages.training.loop import StepInfo
from tristill.stages.training.optimizer import make_optimizer

_ROUNDS, _LEAST_ROUNDS = 9, 3


class _Runner:
    """A student that trains a step at a time."""

    def __init__(
        self,
        config: DistillConfig,
        student_config: StudentConfig,
        shape: Shape,
        source: TargetSource,
        device: torch.device,
    ) -> None:
        student = new_model(shape, source.vocab_size, student_config.quantize, config.training.seed)
        self._objective = Objective(student, config, source).to(device)
        self._config, self._device = config.training, device
        self._optimizer = make_optimizer(self._objective, config.training, self._objective.learning_rates)
        signals = self._objective.signals
        self._batches = endless_batches(source, config.training.batch_windows, signals, config.training.seed)(0)

    def seconds(self) -> float:
        """Time of one step, with the reading of its batch; of one forward pass if a step takes several."""
        started = time.perf_counter()
        batch = next(self._batches)
        bfloat16 = self._config.precision == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bfloat16):
            values = self._objective(batch, StepInfo(0))
        values.total.backward()
        limit = math.inf if self._config.grad_clip is None else self._config.grad_clip
        nn.utils.clip_grad_norm_(self._objective.parameters(), limit)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started


def probe_steps(
    config: DistillConfig,
    student_config: StudentConfig,
    shape: Shape,
    cached: TargetSource,
    online: TargetSource,
    device: torch.device,
    budget_s: float = 60.0,
) -> list[tuple[float, float]]:
    """Seconds of a cached and an online step of the same student on the same windows, in turns; each is first in turn.

    A first round warms up and is not among them; after some `budget_s` no further one is begun, but three are done.
    """
    runners = [_Runner(config, student_config, shape, source, device) for source in (cached, online)]
    started = time.monotonic()
    found: list[tuple[float, float]] = []
    while len(found) <= _LEAST_ROUNDS or (len(found) <= _ROUNDS and time.monotonic() - started < budget_s):
        order = (0, 1) if len(found) % 2 else (1, 0)
        seconds = {which: runners[which].seconds() for which in order}
        found.append((seconds[0], seconds[1]))
    return found[1:]
