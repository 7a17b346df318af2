"""A wheel alone is enough: no checkout, no folder of ours at the top of the environment, the shipped configs inside."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT

FOLDERS = ("cache", "stages", "pipeline", "configs")
CHECK = """
import importlib.util, sys
from pathlib import Path
import tristill.cache, tristill.configs, tristill.pipeline, tristill.stages
from tristill.cache import open_cache
for package in (tristill.cache, tristill.configs, tristill.pipeline, tristill.stages):
    print(Path(package.__file__).parent)
print([name for name in ("cache", "stages", "pipeline", "configs") if importlib.util.find_spec(name)])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, as pip would lay them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", ".", "./source"]
    subprocess.run(command, cwd=folder, check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_holds_all_packages_under_one_name_and_none_at_the_top(site: Path, tmp_path: Path) -> None:
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"tristill"}
    *places, at_the_top = run(site, tmp_path, "-c", CHECK).splitlines()
    assert places == [str(site / "tristill" / name) for name in ("cache", "configs", "pipeline", "stages")]
    assert at_the_top == "[]"


@pytest.mark.slow
def test_a_wheel_runs_in_an_empty_folder_with_the_configs_that_it_brings(site: Path, tmp_path: Path) -> None:
    config = ("--config", "configs/test.toml")
    assert (
        run(site, tmp_path, "-m", "tristill.pipeline", "tokenize", *config).splitlines()[-1].endswith("runs/test/data")
    )
    assert "max_train_windows = 2400" in run(site, tmp_path, "-m", "tristill.pipeline", "config", "show")
    assert (site / "tristill" / "configs" / "sweeps" / "demo.toml").is_file()
