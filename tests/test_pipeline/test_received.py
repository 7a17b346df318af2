"""A run folder is the run that it says it is, and a config that came with it names nothing outside of it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner, Result
from pydantic import BaseModel

from conftest import ROOT
from tristill.pipeline.cli import cli
from tristill.pipeline.config import Config, load_config, save_config, section_types
from tristill.pipeline.errors import OutsideError
from tristill.pipeline.options import arguments_of, workspace_of
from tristill.pipeline.runner import execute
from tristill.pipeline.steps import all_steps
from tristill.pipeline.sweep.config import load_sweep
from tristill.pipeline.sweep.student import Base
from tristill.stages.errors import CheckpointError
from tristill.stages.models import trust
from tristill.stages.models.checkpoint import load_model
from tristill.stages.settings import Outside

DEMO = ROOT / "configs" / "demo.toml"
TEACHER = 'teacher.path="owner/model"'


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TRISTILL_UNTRUSTED_RECORDS", "")


def received(run_dir: Path, *assignments: str) -> Path:
    """A run folder whose config.toml is the test config with changes; RUN stands for the folder."""
    run_dir.mkdir(exist_ok=True)
    changes = tuple(assignment.replace("RUN", str(run_dir)) for assignment in assignments)
    save_config(load_config(ROOT / "configs" / "test.toml", changes), run_dir / "config.toml")
    return run_dir


def tristill(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_a_run_folder_is_its_own_run_unless_a_config_is_named(tmp_path: Path) -> None:
    run = received(tmp_path / "run")
    own, demo = load_config(run / "config.toml"), load_config(DEMO)
    assert workspace_of(None, (), run).config == own
    assert workspace_of(None, ("distill.alpha=0.3",), run).config.distill.alpha == 0.3
    assert workspace_of(DEMO, (), run).config == demo
    assert workspace_of(None, (), tmp_path / "new").config == demo
    assert workspace_of(None, (), None).run_dir == Path("runs/demo")
    assert workspace_of(run / "config.toml", (), None).run_dir == run
    (run / "cache").mkdir()
    assert workspace_of(None, (), None, run / "cache").run_dir == run
    sweep, of_base = load_sweep(ROOT / "configs" / "sweeps" / "demo.toml", ())
    assert Base(sweep, None, of_base, run).workspace.config == own
    assert Base(sweep, ROOT / "configs" / "sweeps" / "demo.toml", of_base, run).workspace.config == demo


def test_children_take_the_config_as_their_parent_did(tmp_path: Path) -> None:
    """What was not named is not named for them: that would be consent."""
    run = received(tmp_path / "run")
    assert arguments_of(workspace_of(None, (), run), None, ()) == ["--run-dir", str(run)]
    named = arguments_of(workspace_of(DEMO, ("distill.alpha=0.3",), run), DEMO, ("distill.alpha=0.3",))
    assert named == ["--config", str(DEMO), "--set", "distill.alpha=0.3", "--run-dir", str(run)]


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        (TEACHER, "teacher.path"),
        ('teacher={path="/models/x", trust_remote_code=true}', "teacher.trust_remote_code"),
        ('student.path="RUN/../other"', "student.path"),
        ('cache.dir="/elsewhere"', "cache.dir"),
        ('cache.dir="~/cache"', "cache.dir"),
        ('cache.url="s3://bucket/cache"', "cache.url"),
        ('distill.caches=[{dir="/elsewhere"}]', "distill.caches.0.dir"),
        ('distill.caches=[{dir="RUN/b", url="http://h/c"}]', "distill.caches.0.url"),
        ('cache={profile={kind="topk"}, ensemble=[{path="../model"}]}', "cache.ensemble.0.path"),
        ('data.source={kind="text", paths=["RUN/a.txt", "/etc/passwd"]}', "data.source.paths"),
        ('data.source={kind="records", paths=["https://h/a.jsonl"]}', "data.source.paths"),
        ('data.source={kind="hf", path="json", arguments={data_files="http://h/x"}}', "data.source.arguments"),
        ('data.source={kind="hf", path="owner/data"}', "data.source.path"),
        ('data.source={kind="synthetic", model="/models/x"}', "data.source.model"),
        ('data.source={kind="synthetic", model="/m", prompts="/etc/passwd"}', "data.source.prompts"),
        ('data.tokenizer={kind="file", path="owner/model"}', "data.tokenizer.path"),
        ('data.tokenizer={kind="file", path="/etc/hostname"}', "data.tokenizer.path"),
    ],
)
def test_what_a_received_config_names_outside_is_found_and_refused_unless_it_is_given(
    tmp_path: Path, assignment: str, key: str
) -> None:
    run = received(tmp_path / "run", assignment)
    workspace = workspace_of(None, (), run)
    assert key in workspace.outside()
    with pytest.raises(OutsideError, match=rf"{key} = .*\n(.*\n)*.* name the config yourself: --config {run}/config"):
        workspace.refuse_outside(key.split(".", maxsplit=1)[0])
    assert workspace_of(run / "config.toml", (), None).outside() == {}
    given = workspace_of(None, (assignment.replace("RUN", str(run)),), run)
    assert given.outside() == {}, "what the command line gives, the user has named"


def test_what_lies_in_the_folder_or_is_changed_on_the_command_line_is_nothing_outside(tmp_path: Path) -> None:
    run = received(tmp_path / "run", 'cache.dir="RUN/other"', "data.tokenizer={kind='file', path='RUN/data'}")
    assert workspace_of(None, (), run).outside() == {}
    other = received(tmp_path / "other", 'cache.dir="/x"', TEACHER)
    assert set(workspace_of(None, ("cache.dir=y",), other).outside()) == {"teacher.path"}


def test_stages_and_variants_are_looked_at_where_they_are_needed(tmp_path: Path) -> None:
    run = received(
        tmp_path / "run", 'stages.a={cache={dir="/x"}, student={path="/y"}}', 'variants.b={student={path="/z"}}'
    )
    workspace = workspace_of(None, (), run)
    assert workspace.outside() == {}
    assert set(workspace.link("a").outside()) == {"cache.dir", "student.path"}
    assert set(workspace.link("b").outside()) == {"student.path"}
    assert workspace.link("a").cache == run / "caches" / "a"
    assert set(workspace_of(None, ("stages.a.cache.dir=/w",), run).link("a").outside()) == {"student.path"}


def sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        for below in section_types(field.annotation):
            yield from sections(below)


def test_every_path_of_the_config_is_marked_as_one_that_may_lead_out() -> None:
    found = {
        f"{section.__name__}.{name}": any(isinstance(mark, Outside) for mark in field.metadata)
        for section in sections(Config)
        for name, field in section.model_fields.items()
        if Path in {field.annotation, *get_args(field.annotation)} or name in {"path", "paths", "url", "dir"}
    }
    assert len(found) >= 12
    assert [name for name, is_marked in found.items() if not is_marked] == []


COMMANDS: dict[str, list[Any]] = {
    "info": ["cache", "info"],
    "verify": ["cache", "verify"],
    "peek": ["cache", "peek"],
    "repair": ["cache", "repair"],
    "fidelity": ["cache", "fidelity"],
    "dump-logits": ["dump-logits"],
    "distill": ["distill", "--name", "x"],
    "sweep": ["sweep", "--make-cache"],
    "plan": ["plan"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_takes_what_leads_out_refuses_and_touches_nothing(tmp_path: Path, command: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    run = received(tmp_path / "run", f'cache.dir="{elsewhere}"', f'cache.url="file://{tmp_path}/url"', "stages={}")
    before = sorted(run.rglob("*"))
    result = tristill(*COMMANDS[command], "--run-dir", run)
    assert isinstance(result.exception, OutsideError), result.output
    assert f"cache.url = 'file://{tmp_path}/url'" in str(result.exception)
    assert sorted(run.rglob("*")) == before
    assert not elsewhere.exists()


@pytest.mark.parametrize(("step", "changes"), [
    (0, ('data.source={kind="text", paths=["/etc/*.conf"]}',)),
    (1, (TEACHER,)),
    (2, ('cache={profile={kind="topk"}, ensemble=[{path="/m"}]}',)),
    (3, ('student.path="/m"',)),
])  # fmt: skip
def test_a_step_is_refused_before_it_begins(tmp_path: Path, step: int, changes: tuple[str, ...]) -> None:
    run = received(tmp_path / "run", "variants={}", *changes)
    with pytest.raises(OutsideError):
        execute(all_steps(workspace_of(None, (), run))[step])
    assert [path.name for path in run.rglob("*") if path.is_file()] == ["config.toml"]


def test_a_report_goes_on_without_it_and_says_so(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    run = received(tmp_path / "run", f'cache.dir="{elsewhere}"', 'cache.url="http://127.0.0.1:9/c"', "variants={}")
    result = tristill("report", "--no-samples", "--run-dir", run)
    assert result.exit_code == 0, result.exception
    assert (run / "report.html").is_file()
    assert result.stderr.count("left out, since") == 1
    assert "cache.url = 'http://127.0.0.1:9/c'; --config" in result.stderr
    assert not elsewhere.exists()


def test_code_is_trusted_only_by_a_config_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.setattr(trust, "_trusted", set())
    run = received(tmp_path / "run", f'teacher={{path="{model}", trust_remote_code=true}}')
    workspace_of(None, (), run)
    workspace_of(None, (f"teacher.path={model}",), run)
    workspace_of(None, ("teacher.trust_remote_code=true",), run)
    assert not trust.is_trusted(model)
    workspace_of(run / "config.toml", (), None)
    assert trust.is_trusted(model)


def test_a_record_in_a_folder_from_elsewhere_leads_to_no_model(tmp_path: Path) -> None:
    run = received(tmp_path / "a\nrun", TEACHER)
    (run / "teacher").mkdir()
    (run / "teacher" / "config.json").write_text("{}")
    (run / "teacher" / "origin.json").write_text(json.dumps({"folder": "/models/x?token=abc"}))
    workspace_of(None, (), run)
    message = rf"{run}/teacher: its origin.json names a model outside of the folder, /models/x\?token=\.\.\., and"
    with pytest.raises(CheckpointError, match=message):
        load_model(run / "teacher")
    assert json.loads(os.environ["TRISTILL_UNTRUSTED_RECORDS"]) == [str(run)], "for processes that this one starts"
    workspace_of(DEMO, (), run)
    assert not trust.follows_records_of(run / "teacher"), "a config that is named, and gives no teacher"
    workspace_of(run / "config.toml", (), None)
    with pytest.raises(CheckpointError, match="found no"):
        load_model(run / "teacher")
    with pytest.raises(CheckpointError, match="outside of the folder"):  # a folder that is named, not what it names
        load_model(workspace_of(DEMO, (), None).model_folder(str(run / "teacher")))


def test_a_link_that_leads_out_is_followed_only_with_a_config_that_is_named(tmp_path: Path) -> None:
    run = received(tmp_path / "run", "variants={}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / "inside").symlink_to(run / "config.toml")
    assert workspace_of(None, (), run).run_dir == run
    (run / "students").symlink_to(elsewhere)
    for arguments in (["report"], ["distill"], ["generate"], ["evaluate"], ["tokenize"]):
        result = tristill(*arguments, "--run-dir", run)
        assert isinstance(result.exception, OutsideError)
        assert f"{run}/students -> '{elsewhere}'" in str(result.exception)
    assert not any(elsewhere.iterdir())
    assert workspace_of(run / "config.toml", (), None).run_dir == run
    (run / "config.toml").unlink()
    (run / "config.toml").symlink_to(DEMO)
    with pytest.raises(OutsideError, match=r"config\.toml -> "):
        workspace_of(None, (), run)
