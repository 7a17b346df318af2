"""The files of a corpus; loads no library for reading them."""

import glob
import os
import posixpath
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath

from tristill.cache.hashing import fingerprint_of, sha256_of_file
from tristill.cache.store import Patience
from tristill.stages.data.config import (
    DataConfig,
    ExistingTokenizer,
    HuggingFaceDataset,
    PythonStdlib,
    RecordFiles,
    SyntheticText,
    TextFiles,
)
from tristill.stages.data.remote_files import IMPATIENT, RemoteFile, is_url, remote_files
from tristill.stages.errors import CorpusError
from tristill.stages.models.origin import find_model

_SMALL_CORPUS_BYTES = 64 * 2**20
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


CorpusFile = Path | RemoteFile


def corpus_files(
    source: PythonStdlib | TextFiles | RecordFiles, patience: Patience | None = None
) -> Sequence[CorpusFile]:
    """The files of a source, sorted by path, local ones first. Raises CorpusError when a path leads to none."""
    if isinstance(source, PythonStdlib):
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [path for path in root.rglob("*.py") if not _NOT_STDLIB & set(path.relative_to(root).parts)]
        if not found:
            raise CorpusError(
                f"{root}: found no source files of the Python standard library; set data.source to other text"
            )
        return sorted(found)
    files: set[Path] = set()
    at_urls: dict[str, RemoteFile] = {}
    for pattern in source.paths:
        if is_url(pattern):
            remote = remote_files(pattern, patience)
            if not remote:
                raise CorpusError(f"{pattern}: found no file there; data.source.paths takes files, folders and globs")
            at_urls |= {file.url: file for file in remote}
            continue
        here = set(_local_files(Path(pattern).expanduser()))
        if not here:
            raise CorpusError(f"{pattern}: found no file there; data.source.paths takes files, folders and globs")
        files |= here
    return [*sorted(files), *sorted(at_urls.values(), key=lambda file: PurePosixPath(file.url))]


def _local_files(pattern: Path) -> Iterator[Path]:
    """A file, all files in a folder, or those of a glob, whose signs may also stand in names that are there."""
    there = next(path for path in [pattern, *pattern.parents] if os.path.exists(path))  # noqa: PTH110 - False where one may not look
    if there != pattern:
        matches = glob.iglob(str(pattern.relative_to(there)), root_dir=there, recursive=True)  # noqa: PTH207
        found: Iterator[Path] = (there / name for name in matches)
    else:
        found = there.rglob("*") if there.is_dir() else iter([there])
    yield from (path for path in found if path.is_file())


def file_bytes(file: CorpusFile) -> int:
    """Bytes of a file of a corpus."""
    return file.stored.num_bytes if isinstance(file, RemoteFile) else file.stat().st_size


def model_files(source: SyntheticText) -> list[Path]:
    """The files that decide what the model of a source writes: its own and the prompts. CorpusError if one is missing.

    Weights are those in safetensors, whole or in parts.
    """
    folder = source.model.expanduser()
    weights = sorted(folder.glob("*.safetensors"))
    files = [folder / "config.json", folder / "tokenizer.json", *(weights or [folder / "model.safetensors"])]
    files += [path for path in [folder / "generation_config.json"] if path.is_file()]
    files += [source.prompts.expanduser()] if source.prompts else []
    if missing := [file for file in files if not file.is_file()]:
        raise CorpusError(
            f"{missing[0]}: found no file there; data.source.model is a folder with config.json, tokenizer.json and "
            "safetensors, data.source.prompts a file"
        )
    return files


def corpus_signature(
    source: PythonStdlib | TextFiles | RecordFiles | HuggingFaceDataset | SyntheticText,
) -> str | None:
    """A sign that files changed, without reading a large corpus; None when they are not on this machine.

    A hash of names and content up to 64 MiB in all; of names, sizes and times beyond that. Of files at URLs, of names,
    sizes and the version (ETag or time) that the store tells; None where it does not answer soon. Names are relative to
    the folder that all files share. The files of a synthetic corpus are its model and prompts.
    """
    return None if isinstance(source, HuggingFaceDataset) else _files_signature(source)


@contextmanager
def refuse_changed_corpus(
    source: PythonStdlib | TextFiles | RecordFiles | HuggingFaceDataset | SyntheticText,
) -> Iterator[None]:
    """Raises CorpusError after the block if the files of the corpus are others than before it."""
    before = corpus_signature(source)
    yield
    if isinstance(source, HuggingFaceDataset):
        return
    _files_signature.cache_clear()
    after = corpus_signature(source)
    # Of a URL that did not answer nothing is known; each file that was fetched was of the size and version looked up.
    is_silent = None in {before, after} and any(is_url(path) for path in getattr(source, "paths", ()))
    if after != before and not is_silent:
        raise CorpusError(
            f"the corpus ({source.kind}): its files changed while they were read; run `tristill tokenize` again once "
            "they stay as they are"
        )


def template_folder(config: DataConfig) -> Path | None:
    """Where the files are that render and tokenize chats; None for plain text, or where they are not here."""
    if config.chat_column is None or not isinstance(config.tokenizer, ExistingTokenizer):
        return None
    return find_model(Path(config.tokenizer.path), None, download=False, weights=False)


def template_signature(config: DataConfig) -> str | None:
    """A hash of the files that render and tokenize chats; None for plain text, or where they are not here."""
    folder = template_folder(config)
    if folder is None:
        return None
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    found = {name: sha256_of_file(folder / name) for name in names if (folder / name).is_file()}
    return fingerprint_of(found) if found else None


@lru_cache
def _files_signature(source: PythonStdlib | TextFiles | RecordFiles | SyntheticText) -> str | None:
    try:
        found = model_files(source) if isinstance(source, SyntheticText) else corpus_files(source, IMPATIENT)
        files = [file for file in found if isinstance(file, Path)]
        at_urls = [file for file in found if isinstance(file, RemoteFile)]
        if at_urls:
            folder = posixpath.commonpath([posixpath.dirname(file.url) for file in at_urls])
            remote = [
                [posixpath.relpath(file.url, folder), file.stored.num_bytes, file.stored.version] for file in at_urls
            ]
            return fingerprint_of([remote, [(str(file), sha256_of_file(file)) for file in files]])
        states = [file.stat() for file in files]
        shared = os.path.commonpath([file.parent for file in files])
        names = [os.path.relpath(file, shared) for file in files]
        if sum(state.st_size for state in states) <= _SMALL_CORPUS_BYTES:
            return fingerprint_of([names, [sha256_of_file(file) for file in files]])
        return fingerprint_of([names, [(state.st_size, state.st_mtime_ns) for state in states]])
    except (CorpusError, OSError, ValueError):
        return None
