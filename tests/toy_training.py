"""The training loop on a toy: a few linear layers that learn a sum, in milliseconds."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from tristill.stages.evaluate.metrics import ValidationMetrics
from tristill.stages.losses.term import LossValues
from tristill.stages.training.config import TrainingConfig
from tristill.stages.training.loop import StepInfo, Training


def config(**changes: object) -> TrainingConfig:
    settings: dict[str, object] = {
        "steps": 20,
        "learning_rate": 1e-2,
        "warmup_steps": 4,
        "log_every": 3,
        "batch_windows": 4,
    }
    return TrainingConfig.model_validate(settings | changes)


def make_module() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 1))


def batches_from(first: int) -> Iterator[torch.Tensor]:
    for number in range(first, 10_000):
        yield torch.randn(4, 5, generator=torch.Generator().manual_seed(number))


def training(
    folder: Path,
    module: nn.Module,
    settings: TrainingConfig,
    batches: Callable[[int], Iterator[torch.Tensor]] = batches_from,
    stop_at: int | None = None,
    measure: Callable[[int], ValidationMetrics] | None = None,
) -> Training[torch.Tensor]:
    seen = 0

    def loss(batch: torch.Tensor, info: StepInfo) -> LossValues:
        nonlocal seen
        seen += 1
        if stop_at is not None and seen > stop_at:
            raise RuntimeError("pulled the plug")
        value = (module(batch) - batch.sum(-1, keepdim=True)).square().mean()
        return LossValues(value, {"square": value.detach()}, {"weights": {"square": 1 / (info.step + 1)}})

    return Training("test", module, loss, batches, 4, settings, folder, measure=measure)


def state(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def logged(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "positions_per_s"} for line in lines]
