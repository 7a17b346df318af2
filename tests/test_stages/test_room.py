"""Folders of models that others wrote: nothing is allocated that their weights have no room for, no pipe is waited for."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tristill.stages.data.tokenizer import load_tokenizer
from tristill.stages.errors import CheckpointError, StageError, TokenizerError
from tristill.stages.models.checkpoint import load_model
from tristill.stages.resources import peak_rss_mib

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 100,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
OURS = {"model_type": "tristill_ternary", "vocab_size": 512, "max_position_embeddings": 32, "eos_token_id": 0}


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run / "students" / "student", tmp_path / "model"))


@pytest.mark.parametrize("is_nested", [True, False], ids=["in a folder of ours", "of transformers"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"found \d+ bytes of weights, but .*config\.json describes \d{10,} parameters"),
        ({"num_hidden_layers": 10**8}, r"found num_hidden_layers = 100000000, expected at most \d+, the number of ten"),
        ({"num_hidden_layers": 2, "vocab_size": 2**31}, "bytes of weights, but"),
        ({"num_hidden_layers": 2, "intermediate_size": 2**40}, "bytes of weights, but"),
    ],
    ids=["wide", "deep", "many words", "very wide"],
)
def test_a_description_that_the_weights_have_no_room_for_is_refused_before_it_takes_memory(
    folder: Path, is_nested: bool, changes: dict[str, int], message: str
) -> None:
    pytest.importorskip("transformers")
    described = QWEN3 | changes
    (folder / "config.json").write_text(json.dumps(OURS | {"hugging_face": described} if is_nested else described))
    before_mib = peak_rss_mib()
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)
    assert peak_rss_mib() - before_mib < 500, "of the library itself"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("of_transformers", [False, True])
def test_a_pipe_in_a_folder_of_a_model_is_refused_and_not_waited_for(
    folder: Path, finished_run: Path, name: str, of_transformers: bool
) -> None:
    if of_transformers:
        pytest.importorskip("transformers")
        config = json.loads((finished_run / "teacher" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "5", "attention_bias": True}))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "tokenizer.json":
        with pytest.raises(TokenizerError, match="is not a regular file"):
            load_tokenizer(folder / name)
    elif name == "generation_config.json" and not of_transformers:
        load_model(folder)  # which does not look at it
    else:
        with pytest.raises((StageError, OSError), match=r"is not a regular file|found no "):
            load_model(folder)
