"""Where a model is that a config names: a folder here, or a snapshot of a repository of the Hugging Face hub."""

import errno
import os
import re
from pathlib import Path

from tristill.stages.errors import CheckpointError

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_DESCRIPTION = ["*.json", "*.jinja", "*.model", "*.txt", "*.py"]
_WEIGHTS = ["*.safetensors"]
_OTHER_HOMES = ("HF_HUB_CACHE", "HF_DATASETS_CACHE")
_NOT_WRITTEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ENOENT}


def find_model(path: Path, revision: str | None, *, download: bool, weights: bool = True) -> Path | None:
    """The folder; None if it is not on this machine and must not be downloaded, or there is no such folder.

    weights: whether those are wanted too.
    """
    folder = path.expanduser()
    if folder.is_dir() or not is_hub_name(path):
        return folder if folder.is_dir() else None
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    wanted = _DESCRIPTION + (_WEIGHTS if weights else [])
    try:
        found = snapshot_download(
            str(path),
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=["origin.json"],
            local_files_only=not download,
        )
    except Exception as exc:  # network, names, access, cache: the library has a kind for each
        if not download:
            return None
        refuse_unwritable_home(exc)
        first_line = (str(exc).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path}: found no folder of that name here, and as a name on the Hugging Face hub it cannot be fetched "
            f"({type(exc).__name__}: {first_line})"
        ) from exc
    return Path(found)


def fetch_model(path: Path, revision: str | None, *, weights: bool = True) -> Path:
    """The folder, downloaded if it is on the hub. Raises CheckpointError if it is nowhere."""
    folder = find_model(path, revision, download=True, weights=weights)
    if folder is None:
        raise CheckpointError(f"{path}: found no folder there; expected one of a model, or a name on the hub")
    return folder


def refuse_unwritable_home(problem: BaseException) -> None:
    """Raise CheckpointError if the problem is that the libraries of the hub cannot write into their own folder."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    homes = [home, *(Path(os.environ[name]).expanduser() for name in _OTHER_HOMES if name in os.environ)]
    found: BaseException | None = problem
    while found is not None:
        if isinstance(found, OSError) and found.filename and found.errno in _NOT_WRITTEN:
            place = Path(os.fsdecode(found.filename))
            if any(place.is_relative_to(home) or home.is_relative_to(place) for home in homes):
                raise CheckpointError(
                    f"{place}: cannot be written ({found.strerror}), and what comes from the Hugging Face hub is kept "
                    "there; make it writable, or set HF_HOME in the environment to a folder that is"
                ) from problem
        found = found.__cause__ or found.__context__


def is_hub_name(path: Path) -> bool:
    """Whether it can be the name of a repository: `name` or `owner/name`."""
    return _HUB_NAME.match(str(path)) is not None
