"""The tree keeps its promises: direction of imports, no cycles, light start-up."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGES = ("pipeline", "stages", "cache")
MAY_IMPORT = {"pipeline": {"stages", "cache"}, "stages": {"cache"}, "cache": set()}
THIRD_PARTY = {
    "pipeline": {
        "click", "jinja2", "matplotlib", "optuna", "pydantic", "pydantic_core", "rich", "sqlalchemy", "tomli_w", "wcwidth",
    },
    "stages": {
        "torch", "numpy", "datasets", "tokenizers", "safetensors", "pydantic", "tqdm", "transformers",
        "accelerate", "gguf", "xllamacpp", "huggingface_hub", "pyarrow",
    },
    "cache": {"fsspec", "numpy", "h5py", "zstandard", "pydantic"},
}  # fmt: skip
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = ("tristill", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards_and_name_only_declared_libraries(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {f"tristill.{name}" for name in {package} | MAY_IMPORT[package]}
    allowed = ours | THIRD_PARTY[package] | set(sys.stdlib_module_names)
    imported = {
        ".".join(name.split(".")[: 2 if name.startswith("tristill.") else 1]) for name in imported_modules(path)
    }
    assert imported <= allowed


def test_no_module_imports_itself_in_a_circle() -> None:
    ours = {module_name(path) for path in FILES}
    graph = {module_name(path): imported_modules(path) & ours - {module_name(path)} for path in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_every_package_is_installed_under_the_one_name() -> None:
    folders = {path.parent for path in FILES if path.name == "__init__.py"} | {ROOT / "configs"}
    names = {f"tristill.{'.'.join(folder.relative_to(ROOT).parts)}" for folder in folders}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert set(settings["packages"]) == names


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import tristill.cache", ("torch", "datasets", "pydantic_settings", "tristill.stages", "tristill.pipeline")),
        ("import tristill.pipeline.cli", ("torch", "datasets", "tokenizers", "matplotlib", "jinja2")),
        ("import tristill.pipeline.report.page", ("torch", "datasets", "matplotlib", "jinja2")),
        ("import tristill.stages.distill.config, stages.teacher.config, stages.dump.config", ("torch", "datasets")),
    ],
)
def test_light_imports_load_no_heavy_library(statement: str, absent: tuple[str, ...]) -> None:
    check = f"import sys; {statement}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_past_400_lines() -> None:
    long = {str(path): n for path in FILES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long
