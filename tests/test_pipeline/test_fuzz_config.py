"""Whatever a config, an assignment, or a folder from elsewhere holds: an error of this project, or what it says."""

import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tomli_w
import torch
from hypothesis import strategies as st
from mutations import ODD_VALUES, changed, edited, fuzz, places

from conftest import ROOT, tristill
from tristill.pipeline.config import Config, load_config
from tristill.pipeline.errors import ConfigError, PipelineError
from tristill.pipeline.provenance import new_provenance, read_provenance
from tristill.pipeline.results import read_summary
from tristill.stages.data.tokenized import load_corpus
from tristill.stages.errors import StageError
from tristill.stages.models.checkpoint import hugging_face_config, load_model, read_tensors
from tristill.stages.models.description import ModelConfig, read_description
from tristill.stages.models.origin import Origin, load_origin, model_files
from tristill.stages.models.transformer import Transformer

SHAPE = ModelConfig(width=16, layers=1, heads=2, mlp_width=16)
counts = pytest.mark.parametrize("num_cases", [60, pytest.param(20_000, marks=pytest.mark.slow)])
BASE = tomllib.loads((ROOT / "configs" / "test.toml").read_text())


def loads_or_refuses(path: Path, assignments: tuple[str, ...], tally: Counter[str]) -> None:
    """A Config, or a ConfigError that names the file or the assignment."""
    try:
        assert isinstance(load_config(path, assignments), Config)
        tally["loaded"] += 1
    except ConfigError as exc:
        assert str(path) in str(exc) or "--set" in str(exc)
        tally["refused"] += 1


@counts
def test_a_config_with_changed_fields_loads_or_is_refused(tmp_path: Path, num_cases: int) -> None:
    path, tally = tmp_path / "a.toml", Counter[str]()

    def check(value: Any) -> None:
        try:
            path.write_text(tomli_w.dumps(value), encoding="utf-8")
        except (TypeError, ValueError):  # what TOML has no word for, as null
            return
        loads_or_refuses(path, (), tally)

    fuzz(check, changed(BASE), num_cases * 2)
    print("fields", dict(tally))
    assert min(tally.values()) > 0


@counts
def test_a_config_of_any_bytes_loads_or_is_refused(tmp_path: Path, num_cases: int) -> None:
    path, tally = tmp_path / "a.toml", Counter[str]()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        loads_or_refuses(path, (), tally)

    fuzz(check, edited((ROOT / "configs" / "test.toml").read_bytes()), num_cases)
    print("bytes", dict(tally))
    assert min(tally.values()) > 0


@counts
def test_any_assignment_is_taken_or_refused(num_cases: int) -> None:
    tally = Counter[str]()
    keys = st.one_of(
        st.sampled_from([".".join(map(str, place)) for place in places(BASE) if place]), st.text(max_size=20)
    )
    values = st.one_of(st.text(max_size=20), ODD_VALUES.map(lambda value: json.dumps(value, ensure_ascii=False)))
    assignments = st.tuples(keys, st.sampled_from(["=", "=", "=", "", "=="]), values).map("".join)

    def check(drawn: list[str]) -> None:
        loads_or_refuses(ROOT / "configs" / "test.toml", tuple(drawn), tally)

    fuzz(check, st.lists(assignments, min_size=1, max_size=3), num_cases)
    print("assignments", dict(tally))
    assert tally["refused"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 20_000, "nested too deeply"),
        ("a = " + "{b=" * 20_000, "nested too deeply"),
        ("a = " + "9" * 5000, "cannot be read as TOML"),
        ("[data]\ncontext_length = 0x" + "f" * 5000, "data.context_length"),
        ("a = 1\na = 2", "Cannot overwrite a value"),
        ("[data]\n[data]", "cannot be read as TOML"),
        ("\ufeffa = 1", "a: unknown key"),  # a byte-order mark is no part of it
    ],
)
def test_odd_toml_is_refused_with_a_message(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize("value", ["[" * 20_000, "{a=" * 20_000, "9" * 5000, "0x" + "f" * 5000, "\ud800"])
def test_odd_assignments_are_refused_with_a_message(value: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.context_length|--set data"):
        load_config(ROOT / "configs" / "test.toml", (f"data.context_length={value}",))


def test_the_command_line_says_so_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("a = " + "[" * 20_000)
    outcome = tristill("tokenize", "--config", str(tmp_path / "a.toml"), "--run-dir", str(tmp_path / "run"))
    assert outcome.code == 2
    assert "nested too deeply" in outcome.stderr


def model_folder(folder: Path) -> Path:
    """A small model of ours with all files that a folder of one may have."""
    folder.mkdir()
    model = Transformer(SHAPE, 32, None)
    model.initialize(torch.Generator().manual_seed(0))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(hugging_face_config(model, 8, {"bos_token_id": 0, "eos_token_id": 0}))
    )
    return folder


def foreign_files(folder: Path) -> dict[str, tuple[dict[str, Any], Any]]:
    """Per file of JSON: what it holds, and what reads it."""
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "model.safetensors"}}
    transformers_config = json.loads((folder / "config.json").read_text()) | {
        "transformers_version": "5.0",
        "rope_scaling": {"rope_type": "default", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "text_config": {"vocab_size": 32, "num_hidden_layers": 1},
    }
    record = new_provenance("teacher", {"a": {"b": 1}}, {"c": "d" * 64}).model_dump(mode="json")
    return {
        "config.json": (json.loads((folder / "config.json").read_text()), lambda: load_model(folder)),
        "config.json of transformers": (transformers_config, lambda: read_description(folder)),
        "origin.json": (Origin(folder=folder).with_fingerprint().model_dump(mode="json"), lambda: load_origin(folder)),
        "model.safetensors.index.json": (index, lambda: model_files(folder)),
        "provenance.json": (record, lambda: read_provenance(folder)),
        "summary.json": ({"train": {"steps": 1}, "validation": {"perplexity": 2.0}}, lambda: read_summary(folder)),
        "data.json": ({"context_length": 8}, lambda: load_corpus(folder)),
    }


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "config.json of transformers",
        "origin.json",
        "model.safetensors.index.json",
        "provenance.json",
        "summary.json",
        "data.json",
    ],
)
@pytest.mark.parametrize("num_cases", [40, pytest.param(3_000, marks=pytest.mark.slow)])
def test_files_of_a_folder_from_elsewhere_are_read_or_refused(tmp_path: Path, name: str, num_cases: int) -> None:
    """Changed fields, then any bytes. Models are made only of descriptions that the file of weights has room for."""
    original, read = foreign_files(model_folder(tmp_path / "model"))[name]
    path, tally = tmp_path / "model" / name.split(maxsplit=1)[0], Counter[str]()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read()
            tally["read"] += 1
        except (StageError, PipelineError) as exc:
            assert path.parent.name in str(exc), "it says where"
            tally["refused"] += 1

    fuzz(check, changed(original).map(lambda value: json.dumps(value).encode()), num_cases)
    fuzz(check, edited(json.dumps(original).encode()), num_cases)
    for deep in (b"[" * 60_000, b'{"a":' * 60_000, b"[]", b"null", b"1"):
        check(deep)
    print(name, dict(tally))
    assert tally["refused"]


@pytest.mark.parametrize("num_cases", [60, pytest.param(20_000, marks=pytest.mark.slow)])
def test_weights_of_any_bytes_are_read_or_refused(tmp_path: Path, num_cases: int) -> None:
    path, tally = model_folder(tmp_path / "model") / "model.safetensors", Counter[str]()
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            tensors = read_tensors(path)
            assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)
            tally["read"] += 1
        except StageError:
            tally["refused"] += 1

    def with_header(value: Any) -> bytes:
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + size :]

    fuzz(check, st.one_of(edited(good), changed(header).map(with_header)), num_cases)
    print("weights", dict(tally))
    assert tally["refused"]


def test_a_description_of_a_huge_model_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for key, value in (("hidden_size", 2**40), ("num_hidden_layers", 10**4), ("vocab_size", 2**31)):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(StageError, match=r"found [0-9]+ bytes of weights, but .* describes [0-9]+ parameters"):
            load_model(folder)
