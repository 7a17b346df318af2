"""What others wrote is data: nothing of it is unpickled or run, and no name or link of it leads out of its folder."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_caches import write_tiny_cache

from conftest import ENVIRONMENT, ROOT
from tristill.cache import CacheCorruptError, CacheError, open_cache, verify_cache
from tristill.cache.atomic import write_atomically
from tristill.cache.layout import MANIFEST_NAME, TABLES_NAME, TOKENIZER_NAME
from tristill.cache.manifest import load_manifest
from tristill.cache.repair import SCRATCH_NAME, take_back
from tristill.stages.errors import CheckpointError
from tristill.stages.models.origin import model_files

SOURCES = sorted(path for package in ("cache", "stages", "pipeline") for path in (ROOT / package).rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "jsonpickle"}
RUN_TEXT = {"eval", "exec", "compile", "__import__"}
SENT_AS_PICKLE = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
"""Of torch.distributed: they unpickle what other ranks send."""


def dangers(path: Path) -> Iterator[str]:
    """Calls and imports in a source file by which bytes could become code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from (f"{where}: import {name}" for name in modules if name.split(".")[0] in UNPICKLERS)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        last = called.split(".")[-1]
        if called in RUN_TEXT or last in SENT_AS_PICKLE:
            yield f"{where}: {called}()"
        if called == "torch.load" and arguments.get("weights_only") != "True":
            yield f"{where}: torch.load without weights_only=True"
        if called in ("np.load", "numpy.load") and arguments.get("allow_pickle") != "False":
            yield f"{where}: np.load without allow_pickle=False"
        if arguments.get("shell") == "True" or called == "os.system":
            yield f"{where}: a shell"
        if "trust_remote_code" in arguments and arguments["trust_remote_code"] not in (
            "False",
            "is_trusted(origin.folder)",
        ):
            yield f"{where}: trust_remote_code={arguments['trust_remote_code']}"


def test_no_source_file_unpickles_or_runs_what_it_reads() -> None:
    assert len(SOURCES) > 150
    assert [danger for path in SOURCES for danger in dangers(path)] == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "eval(text)",
        "dist.all_gather_object(a, b)",
        "subprocess.run(c, shell=True)",
        "from_pretrained(f, trust_remote_code=True)",
    ],
)
def test_the_walk_of_the_sources_sees_what_it_looks_for(tmp_path: Path, text: str) -> None:
    source = tmp_path / "a.py"
    source.write_text(text)
    assert len(list(dangers(source))) == 1


# Tells every class that an unpickler looks up, with the file that asked for it, and goes on as `python -m tristill.pipeline`.
HOOK = """
import sys
def hook(event, arguments):
    if event == "pickle.find_class":
        frame, files = sys._getframe(1), []
        while frame:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        with open(LOG, "a") as log:
            log.write(repr((arguments, files)) + "\\n")
LOG = sys.argv.pop(1)
sys.addaudithook(hook)
from tristill.pipeline.__main__ import main
main()
"""


@pytest.mark.parametrize(
    "commands",
    [
        pytest.param(["evaluate"], id="evaluate"),
        pytest.param(
            ["tokenize --force", "teacher --force", "dump-logits --force", "distill --force", "cache verify"],
            id="all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_no_stage_unpickles_anything_that_it_reads(copied_run: Path, tmp_path: Path, commands: list[str]) -> None:
    """Stages run again on a finished run's files; a library may unpickle what it has itself pickled in this process."""
    log = tmp_path / "log"
    options = ["--config", "configs/test.toml", "--run-dir", str(copied_run)]
    for command in map(str.split, commands):
        done = subprocess.run(
            [sys.executable, "-c", HOOK, str(log), *command, *options],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert not log.exists(), log.read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_cache(tmp_path / "cache", "coded")
    return tmp_path / "cache"


@pytest.mark.parametrize("name", [MANIFEST_NAME, TABLES_NAME, TOKENIZER_NAME, "train-00000.h5"])
@pytest.mark.parametrize("kind", ["a link", "a pipe"])
def test_a_link_or_a_pipe_for_any_file_of_a_cache_is_refused(
    folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    """Also a link to the very file that stood there."""
    path = folder / name
    path.rename(tmp_path / name)
    if kind == "a link":
        path.symlink_to(tmp_path / name)
    else:
        os.mkfifo(path)
    message = "is a link, not a regular file" if kind == "a link" else "is not a regular file|bytes, expected"
    with pytest.raises(CacheError, match=message) as refused:
        open_cache(folder).window("train", 0)
    assert name in str(refused.value)
    try:
        problems = verify_cache(folder, lambda _: None)
    except CacheCorruptError as exc:
        problems = [str(exc)]
    assert any(name in problem for problem in problems)


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symlink", "hard link"])
def test_a_partial_file_that_is_a_link_does_not_lead_a_write_elsewhere(tmp_path: Path, link: object) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "cache").mkdir()
    link(victim, tmp_path / "cache" / ".cache.json.partial")  # type: ignore[operator]
    write_atomically(tmp_path / "cache" / "cache.json", b"{}")
    assert victim.read_text() == "precious"
    assert (tmp_path / "cache" / "cache.json").read_bytes() == b"{}"
    assert not (tmp_path / "cache" / "cache.json").is_symlink()


def test_a_file_that_is_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "cache.json").symlink_to(victim)
    write_atomically(tmp_path / "cache.json", b"{}")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "cache.json").is_symlink()


def test_a_scratch_folder_of_repair_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "train-00000.h5").write_bytes((folder / "train-00000.h5").read_bytes())
    (folder / SCRATCH_NAME).symlink_to(elsewhere)
    with pytest.raises(CacheCorruptError, match="is a link, and no repair makes one"):
        take_back(folder, load_manifest(folder), ["train-00000.h5"])
    assert (elsewhere / "train-00000.h5").exists()


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "model.bin", "sub/model.safetensors", 1])
def test_an_index_of_weights_names_files_of_its_own_folder_only(tmp_path: Path, name: object) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json: names .* which is no \*\.safetensors of its own folder"):
        model_files(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert [file.name for file in model_files(tmp_path)] == ["config.json", "model.safetensors", index.name]
