"""A run in seconds, without the command line: tokens and a teacher, to dump and distil from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tristill.stages.data.config import DataConfig
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.distill.choose import Places, choose_source
from tristill.stages.distill.config import DistillConfig, StudentConfig
from tristill.stages.distill.distill import StudentSummary, distill
from tristill.stages.dump.config import DumpConfig
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.models.description import ModelConfig
from tristill.stages.targets.source import TargetSource
from tristill.stages.teacher.config import TeacherConfig
from tristill.stages.teacher.train import train_teacher

CPU = torch.device("cpu")
SHAPE = ModelConfig(width=16, layers=2, heads=2, mlp_width=24)


def make_run(folder: Path, num_files: int = 60) -> Path:
    """A folder with tokens and a teacher that has learned something."""
    (folder / "corpus").mkdir()
    generator = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "of", "and"]
    for n in range(num_files):
        (folder / "corpus" / f"{n}.txt").write_text(" ".join(generator.choice(words, 150)))
    data = DataConfig.model_validate(
        {
            "source": {"kind": "text", "paths": [str(folder / "corpus")]},
            "tokenizer": {"kind": "bpe", "vocab_size": 270},
            "context_length": 12,
            "validation_fraction": 0.2,
        }
    )
    tokenize_corpus(data, folder / "data")
    make_teacher(folder, "teacher", SHAPE, steps=30)
    return folder


def make_teacher(run: Path, name: str, shape: ModelConfig, steps: int) -> None:
    """A teacher of the run's tokens in a folder of the run."""
    settings = {"model": shape.model_dump(), "training": {"steps": steps, "learning_rate": 1e-2, "batch_windows": 8}}
    train_teacher(TeacherConfig.model_validate(settings), run / "data", run / name, EvaluateConfig())


def dump_config(**changes: object) -> DumpConfig:
    settings: dict[str, object] = {
        "profile": {"kind": "plain_topk", "top_k": 5, "logit_dtype": "float32"},
        "hidden_layers": [0, 2],
        "max_train_windows": 700,
        "shard_positions": 4096,
    }
    return DumpConfig.model_validate(settings | changes)


def distill_config(**changes: object) -> DistillConfig:
    training = {"steps": 12, "learning_rate": 1e-2, "batch_windows": 8, "log_every": 1, "checkpoint_every": 5}
    return DistillConfig.model_validate({"training": training, **changes})


def places(run: Path, cache: Path) -> Places:
    return Places(cache=cache, data=run / "data", teacher=run / "teacher")


def student_of(
    run: Path, cache: Path, folder: Path, config: DistillConfig, dump: DumpConfig, student: StudentConfig | None = None
) -> tuple[StudentSummary, list[dict[str, Any]]]:
    source = choose_source(config, dump, SHAPE.layers, places(run, cache), CPU)
    return student_from(source, run, folder, config, student)


def student_from(
    source: TargetSource, run: Path, folder: Path, config: DistillConfig, student: StudentConfig | None = None
) -> tuple[StudentSummary, list[dict[str, Any]]]:
    """A student trained in `folder`, or the rest of its training; its summary and the lines of its metrics."""
    student = student or StudentConfig()
    summary = distill(
        config, student, student.model or SHAPE, source, CPU, folder, run / "teacher", EvaluateConfig(), {"cache": "x"}
    )
    return summary, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
