"""The files of a corpus; loads no library for reading them."""

import glob
import sysconfig
from pathlib import Path

from cache.hashing import fingerprint_of
from stages.data.config import HuggingFaceDataset, PythonStdlib, TextFiles
from stages.errors import CorpusError

_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


def corpus_files(source: PythonStdlib | TextFiles) -> list[Path]:
    """The files of a source, sorted by path. Raises CorpusError when a path leads to none."""
    if isinstance(source, PythonStdlib):
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in root.rglob("*.py") if not _NOT_STDLIB & set(path.relative_to(root).parts)]
        if not files:
            raise CorpusError(
                f"{root}: found no source files of the Python standard library; set data.source to other text"
            )
        return sorted(files)
    files = []
    for pattern in source.paths:
        expanded = Path(pattern).expanduser()
        if expanded.is_dir():
            found = [path for path in expanded.rglob("*") if path.is_file()]
        else:
            found = [Path(name) for name in glob.glob(str(expanded), recursive=True) if Path(name).is_file()]  # noqa: PTH207
        if not found:
            raise CorpusError(f"{pattern}: found no file there; data.source.paths takes files, folders and globs")
        files += found
    return sorted(set(files))


def corpus_signature(source: PythonStdlib | TextFiles | HuggingFaceDataset) -> str | None:
    """A cheap sign that files changed (paths, sizes, times), without reading them; None when they are not here."""
    if isinstance(source, HuggingFaceDataset):
        return None
    try:
        states = [(str(file), file.stat()) for file in corpus_files(source)]
    except (CorpusError, OSError):
        return None
    return fingerprint_of([(name, state.st_size, state.st_mtime_ns) for name, state in states])
