"""Real students of width 256, as wide as ternary blocks want them, trained for a few seconds."""

from pathlib import Path

import torch

from tristill.stages.data.config import DataConfig
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.data.tokenized import split_windows
from tristill.stages.distill.config import DistillConfig, StudentConfig
from tristill.stages.distill.distill import distill
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.export.parity import HeldOut
from tristill.stages.models.description import ModelConfig
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.targets.online import OnlineSource

CONTEXT = 64
LONG_CONTEXT = 72
"""Has room for a prompt and 64 tokens."""
BYTES, BPE = 257, 512
"""Vocabularies: bytes and the end of text alone, or with merges."""
SHAPE = ModelConfig(width=256, layers=2, heads=4, kv_heads=2, mlp_width=512)


def make_tokens(folder: Path, vocab_size: int, context: int = CONTEXT, train_tokens: int = 60_000) -> Path:
    data = DataConfig.model_validate(
        {
            "source": {"kind": "python-stdlib"},
            "tokenizer": {"kind": "bpe", "vocab_size": vocab_size, "train_bytes": 200_000},
            "context_length": context,
            "validation_fraction": 0.2,
            "max_train_tokens": train_tokens,
            "max_validation_tokens": 4_000,
        }
    )
    tokenize_corpus(data, folder)
    return folder


def make_student(
    folder: Path, data: Path, quantize: QuantizeConfig, shape: ModelConfig = SHAPE, steps: int = 40
) -> Path:
    folder.mkdir(parents=True)
    config = DistillConfig.model_validate(
        {"alpha": 1.0, "targets": "online", "training": {"steps": steps, "learning_rate": 4e-3, "batch_windows": 8}}
    )
    source = OnlineSource(data, torch.device("cpu"))
    student = StudentConfig(model=shape, quantize=quantize)
    distill(config, student, shape, source, torch.device("cpu"), folder, folder, EvaluateConfig(), {})
    return folder


def held_out_text(data: Path, windows: int = 16) -> HeldOut:
    ids = torch.from_numpy(split_windows(data, "validation").read(list(range(windows)))).long()
    return HeldOut(tuple(ids[:, :-1]), tuple(ids[:, 1:]))
