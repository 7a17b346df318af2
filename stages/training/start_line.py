"""What a training or a dump is about to do, in two lines: device, sizes, steps and epochs."""

from pathlib import Path

import torch

from tristill.cache.regular_file import read_json_object
from tristill.stages.progress import say
from tristill.stages.ranks import Ranks
from tristill.stages.targets.source import TargetSource
from tristill.stages.threads import num_threads
from tristill.stages.training.config import TrainingConfig


def say_start(label: str, model: str, device: torch.device, precision: str, ranks: Ranks) -> None:
    """Which model, on what."""
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    threads = num_threads()
    many = f", {ranks.world_size} ranks" if ranks.are_many else ""
    say(f"{label}: {model}; on {name} in {precision}, {threads} thread{'s' * (threads != 1)}{many}")
    if device.type == "cpu" and precision == "bfloat16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        say(
            f"warning: {label}: this processor has no instructions for bfloat16, whose products take tens of times as "
            "long as those of float32; set precision (of a given teacher, dtype) to float32"
        )


def say_length(label: str, config: TrainingConfig, source: TargetSource) -> None:
    """How long the training is, and how often it goes over the windows."""
    per_step = config.batch_windows * config.accumulation * source.context_length
    positions, once = config.steps * per_step, source.num_windows("train") * source.context_length
    over = "cached positions" if source.kind == "cached" else "positions of the train split"
    say(
        f"{label}: {config.steps:,} steps of {per_step:,} positions are {positions:,}: {positions / once:.2f} epochs "
        f"over {once:,} {over}"
    )


def parameters_text(folder: Path) -> str:
    """Parameters of a finished model, as its summary says; empty where there is none that does."""
    try:
        summary = read_json_object(folder / "summary.json")
    except (OSError, ValueError):
        return ""
    model = summary.get("model")
    found = summary.get("parameters", model.get("parameters") if isinstance(model, dict) else None)
    return f"{found:,} parameters" if isinstance(found, int) else ""
