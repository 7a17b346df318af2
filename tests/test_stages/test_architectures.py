"""Architectures of transformers as teachers and students: each works, or is refused with a reason of ours."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    Outcome,
    causal_architectures,
    document,
    documented,
    outcome,
    outcome_lines,
    write_architecture,
)
from small_models import VOCAB, describe, write_corpus, write_model, write_tokenizer

from tristill.stages.data.config import DataConfig
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.errors import CheckpointError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.evaluate.evaluate import evaluate
from tristill.stages.models.checkpoint import new_model
from tristill.stages.models.generate import Sampling, generate, load_causal_model
from tristill.stages.models.hugging_face import HuggingFaceModel
from tristill.stages.models.hugging_face_folder import hugging_face_shape, load_hugging_face
from tristill.stages.models.language_model import State, require_positions
from tristill.stages.models.origin import Origin
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.targets.online import OnlineSource
from tristill.stages.teacher.config import TeacherConfig
from tristill.stages.teacher.given import take_teacher

pytest.importorskip("transformers")
CONTEXT = 24
USUAL = ("llama", "qwen3", "gemma3_text", "gpt2", "qwen3_moe", "bamba", "falcon", "phimoe", "bert", "reformer")
"""Tried in every run of the tests; all others in the slow one."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data")
    tokenizer_json = write_tokenizer(place / "t" / "tokenizer.json")
    source = {"kind": "text", "paths": [str(write_corpus(place / "corpus.txt", 120))], "documents": "line"}
    settings = {
        "source": source,
        "tokenizer": {"kind": "file", "path": str(tokenizer_json)},
        "context_length": CONTEXT,
        "validation_fraction": 0.2,
        "max_train_tokens": 2_000,
        "max_validation_tokens": 2 * CONTEXT + 2,
    }
    tokenize_corpus(DataConfig.model_validate(settings), place / "data")
    return place / "data"


@pytest.mark.parametrize("kind", USUAL)
def test_an_architecture_does_what_the_page_of_models_says(kind: str, data: Path, tmp_path: Path) -> None:
    assert outcome_lines({kind: outcome(kind, tmp_path / "m", data)}) == {kind: documented()[kind]}


@pytest.mark.slow
def test_every_architecture_does_what_the_page_of_models_says(data: Path, tmp_path: Path) -> None:
    found: dict[str, Outcome] = {}
    for kind in causal_architectures():
        found[kind] = outcome(kind, tmp_path / kind, data)
    if os.environ.get("ARCHITECTURES") == "write":
        document(outcome_lines(found))
    assert outcome_lines(found) == documented()


def load(kind: str, folder: Path, **settings: Any) -> HuggingFaceModel:
    write_model(folder, kind, write_tokenizer(folder / "tokenizer.json"), **settings)
    return load_hugging_face(Origin(folder=folder), folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("gpt2", {"n_positions": 16}), ("opt", {"max_position_embeddings": 16, "word_embed_proj_dim": 32})],
)
def test_windows_longer_than_a_table_of_positions_are_refused_where_they_meet(
    kind: str, settings: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    model = load(kind, tmp_path, **settings)
    assert model.max_positions == 16
    require_positions(model, 16)
    (tmp_path / "t").mkdir()
    expected = r"data.context_length: found 24, expected at most 16, .* `tristill tokenize --force`"
    with pytest.raises(CheckpointError, match=expected):
        evaluate(model, OnlineSource(data, torch.device("cpu")), EvaluateConfig(), "teacher")
    with pytest.raises(CheckpointError, match=expected):
        take_teacher(TeacherConfig(path=str(tmp_path)), data, tmp_path / "t", "cpu", EvaluateConfig())
    with pytest.raises(CheckpointError, match=expected):
        require_positions(new_model(model.shape, VOCAB, None, 0), CONTEXT)
    assert load_causal_model(tmp_path, torch.device("cpu")).max_positions == 16


def test_a_rotary_model_beyond_its_training_is_warned_of_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for trained, warnings in ((16, 1), (CONTEXT, 0)):
        load("qwen3", tmp_path / str(trained), max_position_embeddings=trained)
        config = TeacherConfig(path=str(tmp_path / str(trained)))
        (tmp_path / f"t{trained}").mkdir()
        take_teacher(config, data, tmp_path / f"t{trained}", "cpu", EvaluateConfig())
        assert capsys.readouterr().err.count(f"made for {trained} positions, and data.context_length is 24") == warnings


def test_more_than_one_residual_stream_is_refused_as_hidden_states(data: Path, tmp_path: Path) -> None:
    write_architecture("gemma3n_text", tmp_path / "m", data / "tokenizer.json")
    model = load_hugging_face(Origin(folder=tmp_path / "m"), data / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"\(2, 1, 8, 32\) there, expected \(batch, positions, width\)"):
        model(torch.arange(8)[None], [State("residual", 1)])


def test_logits_that_are_no_finite_numbers_are_refused_with_the_dtype(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    load("gemma", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.post_feedforward_layernorm.weight"] += 40_000.0  # as those of Gemma 3
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_hugging_face(Origin(folder=tmp_path, dtype="bfloat16"), tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"its logits: found numbers that are not finite; float16 ends at 65504"):
        load_hugging_face(Origin(folder=tmp_path, dtype="float16"), tmp_path / "tokenizer.json")


@pytest.mark.parametrize("kind", ["granitemoehybrid", "falcon_h1", "llama"])
def test_rows_of_different_length_are_written_as_each_alone(kind: str, data: Path, tmp_path: Path) -> None:
    write_architecture(kind, tmp_path / "m", data / "tokenizer.json")
    model = load_causal_model(tmp_path / "m", torch.device("cpu"))
    prompts: Sequence[Sequence[int]] = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21], [30, 31, 32], [40, 41]]
    uniform_BM = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    together = generate(model, prompts, Sampling(1.0, 1.0, 9), uniform_BM)
    alone = [
        generate(model, [prompt], Sampling(1.0, 1.0, 9), uniform_BM[row : row + 1])[0]
        for row, prompt in enumerate(prompts)
    ]
    assert together == alone


def test_numbers_that_json_does_not_have_describe_a_student(data: Path, tmp_path: Path) -> None:
    write_architecture("mamba2", tmp_path / "m", data / "tokenizer.json")
    describe(tmp_path / "m", time_step_limit=[0.0, float("inf")])  # as files of transformers 4 have it
    student = new_model(hugging_face_shape(tmp_path / "m"), VOCAB, QuantizeConfig(layers=("backbone.layers.*",)), 0)
    assert isinstance(student, HuggingFaceModel)
    assert student.inner.config.time_step_limit[1] == float("inf")


def test_a_model_that_looks_ahead_is_refused(data: Path, tmp_path: Path) -> None:
    write_architecture("cpmant", tmp_path / "m", data / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"its logits change with ids that come later .* set is_decoder"):
        load_hugging_face(Origin(folder=tmp_path / "m"), data / "tokenizer.json")
