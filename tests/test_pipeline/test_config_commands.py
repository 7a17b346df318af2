"""What a config means is said by the program: `config show`, `explain` and `schema`; `init` writes a first one."""

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from conftest import ROOT
from tristill.pipeline.cli import cli
from tristill.pipeline.config import Config, load_config
from tristill.pipeline.config_fields import config_text, explanation, known_fields
from tristill.pipeline.errors import ConfigError

SHIPPED = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_config_that_is_shown_loads_again_as_the_same(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ('distill.losses=[{kind="reverse_kl", weight=0.5}]',))
    (tmp_path / "shown.toml").write_text(config_text(config))
    assert load_config(tmp_path / "shown.toml") == config


def test_what_is_not_the_default_is_marked_with_the_default() -> None:
    result = CliRunner().invoke(cli, ["config", "show", "--config", str(SHIPPED[-2]), "--set", "distill.alpha=0.25"])
    assert result.exit_code == 0, result.exception
    lines = result.stdout.splitlines()
    assert "alpha = 0.25  # set; the default is none" in lines
    assert "width = 32  # set; it has no default" in lines
    assert 'targets = "cached"' in lines, "a default has no mark"
    assert "alpha = 1.0" in lines, "of a variant, which is a change by itself"


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("distill.alpha", ["distill.alpha: number or table or none", "cross-entropy", "takes the place of losses"]),
        ("teacher.path", ["takes the place of model and training", "changes no result"]),
        ("data.context_length", ["data.context_length: int, >= 1, <= 1048576; default: 256", "positions per window"]),
        ("data.source.paths", ['of kind = "text"', 'of kind = "records"', "default: required"]),
        ("cache.profile", ["default: sampled", 'kind = "transform": step, coded_above']),
        ("distill.caches.0.weight", ["distill.caches.weight: float, > 0; default: 1.0"]),
        ("variants.x.distill.training.steps", ["distill.training.steps: int"]),
    ],
)
def test_a_setting_is_explained(key: str, parts: list[str]) -> None:
    result = CliRunner().invoke(cli, ["config", "explain", key])
    assert [part for part in parts if part not in result.stdout] == []


def test_every_setting_has_an_explanation() -> None:
    keys = {known.key for known in known_fields(Config)}
    assert len(keys) > 150
    for key in keys:
        assert explanation(key).startswith(key)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("distil.alpha", "did you mean distill.alpha"),
        ("learning_rate", "teacher.training.learning_rate"),
        ("q", "show"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: unknown key; .*{near}"):
        explanation(key)


def test_the_schema_knows_every_table_and_refuses_unknown_keys() -> None:
    schema = json.loads(CliRunner().invoke(cli, ["config", "schema"]).stdout)
    assert set(tomllib.loads((ROOT / "configs" / "test.toml").read_text())) <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    student = schema["$defs"]["StudentConfig"]
    assert student["properties"]["init"]["enum"] == ["random", "teacher", "given"]
    assert student["additionalProperties"] is False


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--text", "a b/*.txt", "--text", 'q"uote.txt'],
        ["--teacher", "owner/model"],
        ["--text", "x", "--teacher", "/m"],
    ],
)
def test_a_first_config_loads_and_is_what_was_asked_for(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "new" / "my\x1b[2J\nconfig.toml"  # a name that no comment of TOML holds
    result = CliRunner().invoke(cli, ["init", str(path), *options])
    assert result.exit_code == 0, result.exception
    config = load_config(path)
    given = dict(zip(options[-2::2], options[-1::2], strict=True)).get("--teacher")
    assert (None if config.teacher.path is None else str(config.teacher.path)) == given
    assert getattr(config.data.tokenizer, "path", None) == given, "the tokenizer is the teacher's"
    texts = [value for name, value in zip(options[::2], options[1::2], strict=True) if name == "--text"]
    assert list(getattr(config.data.source, "paths", ())) == texts
    before = path.read_bytes()
    again = CliRunner().invoke(cli, ["init", str(path)])
    assert "is there already, and is not replaced" in str(again.exception)
    assert path.read_bytes() == before


def test_a_first_config_that_would_not_load_is_not_left(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["init", str(tmp_path / "a.toml"), "--text", "https://u:p@h/x"])
    assert isinstance(result.exception, ConfigError)
    assert not (tmp_path / "a.toml").exists()
