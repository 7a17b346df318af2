"""Numbers that are not finite are refused by name wherever they first appear: layer, position, type, what to do."""

import random
from pathlib import Path

import pytest
import torch
from chats import sentence

from tristill.stages.data.config import DataConfig
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.dump.config import DumpConfig
from tristill.stages.dump.dump import dump_logits
from tristill.stages.errors import CheckpointError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.evaluate.evaluate import evaluate
from tristill.stages.generate.text import generate_text
from tristill.stages.models.checkpoint import load_model, save_model
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.language_model import State, finite_features
from tristill.stages.models.transformer import Transformer
from tristill.stages.targets.online import OnlineSource
from tristill.stages.targets.source import Epoch, Signals

CPU = torch.device("cpu")
SHAPE = ModelConfig(width=16, layers=3, heads=2, mlp_width=32, tied_embeddings=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Tokens, and a teacher whose residual stream overflows from its second block on."""

    generator = random.Random(0)
    (tmp_path / "text.txt").write_text("\n".join(sentence(generator, 20) for _ in range(40)))
    data = DataConfig.model_validate(
        {
            "source": {"kind": "text", "paths": [str(tmp_path / "text.txt")], "documents": "line"},
            "tokenizer": {"kind": "bpe", "vocab_size": 300},
            "context_length": 16,
            "validation_fraction": 0.3,
        }
    )
    corpus = tokenize_corpus(data, tmp_path / "data")
    teacher = Transformer(SHAPE, corpus.vocab_size)
    teacher.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        teacher.get_parameter("model.layers.1.mlp.down_proj.weight").fill_(torch.inf)
    save_model(tmp_path / "teacher", teacher, tmp_path / "data" / "tokenizer.json", 16, corpus.end_of_text_id)
    return tmp_path


WHERE = r"final states \(from layer 2 of 3 on\) are not finite at \d+ of \d+ positions .* computed in float32"


def test_a_dump_refuses_a_teacher_that_overflows(place: Path) -> None:
    with pytest.raises(CheckpointError, match=f"the teacher: {WHERE}; its weights are damaged or diverged"):
        dump_logits(DumpConfig(calibration_windows=4), place / "data", place / "teacher", place / "cache")
    assert not (place / "cache" / "cache.json").exists()


def test_online_targets_evaluation_and_generation_refuse_it_too(place: Path) -> None:
    teacher = load_model(place / "teacher")
    source = OnlineSource(place / "data", CPU, teacher=teacher)
    with pytest.raises(CheckpointError, match=f"the teacher: {WHERE}"):
        next(iter(source.batches("train", 4, Signals(targets=True), Epoch())))
    with pytest.raises(CheckpointError, match=f"mine: {WHERE}"):
        evaluate(teacher, OnlineSource(place / "data", CPU), EvaluateConfig(), "mine")
    with pytest.raises(CheckpointError, match=r"the logits of position \d+: found numbers that are not finite"):
        list(generate_text(place / "teacher", "the moon", temperature=1.0, top_p=1.0, seed=0, max_tokens=3))


def test_states_that_are_asked_for_are_refused_by_layer_and_float16_is_named() -> None:
    model = Transformer(SHAPE, 50)
    model.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, size in (("gate_proj", 1.0), ("up_proj", 1.0), ("down_proj", 6e4)):
            model.get_parameter(f"model.layers.1.mlp.{name}.weight").fill_(size)
    ids = torch.arange(20).view(2, 10)
    finite_features(model, ids, [State("residual", 2)])  # float32 holds them
    message = r"states of layer 2 are not finite .*computed in float16; float16 ends at 65504: set teacher.dtype to"
    with pytest.raises(CheckpointError, match=message):
        finite_features(model.half(), ids, [State("residual", 1), State("residual", 2)])


def test_infinite_logits_of_finite_states_are_refused(place: Path) -> None:
    teacher = load_model(place / "teacher")
    with torch.no_grad():
        teacher.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()
        teacher.get_parameter("lm_head.weight")[7].fill_(torch.inf)
    tokenizer = place / "data" / "tokenizer.json"
    save_model(place / "teacher", teacher, tokenizer, 16, 0)
    with pytest.raises(CheckpointError, match="the teacher's logits: found numbers that are not finite"):
        dump_logits(DumpConfig(calibration_windows=4), place / "data", place / "teacher", place / "cache")
