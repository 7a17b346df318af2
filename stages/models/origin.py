"""Location of a model: a folder, a snapshot of the Hugging Face hub, or the record of either (`origin.json`)."""

import errno
import os
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tristill.cache.atomic import write_atomically
from tristill.cache.hashing import fingerprint_of, sha256_of_file
from tristill.cache.regular_file import read_file, read_json_object
from tristill.cache.secrets import masked
from tristill.stages.errors import CheckpointError
from tristill.stages.models.description import CONFIG_NAME, read_config
from tristill.stages.models.trust import follows_records_of

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


ORIGIN_NAME = "origin.json"
Dtype = Literal["float32", "bfloat16", "float16"]


class OriginFile(BaseModel):
    """One file of the model as it was when it was hashed."""

    model_config = ConfigDict(frozen=True)

    name: str
    num_bytes: int
    modified_ns: int


class Origin(BaseModel):
    """The folder of the model, how it is loaded, and what it is: SHA-256 over description, weights and dtype.

    named: what the config called it, with the revision. Whether its own code may run is not kept here: see trust.py.
    """

    model_config = ConfigDict(frozen=True)

    folder: Path
    dtype: Dtype = "float32"
    attention: str | None = None
    named: str | None = None
    files: tuple[OriginFile, ...] = ()
    fingerprint: str = ""

    def with_fingerprint(self) -> "Origin":
        """The same with its files read and hashed."""
        files = model_files(self.folder)
        hashes = [sha256_of_file(self.folder / file.name) for file in files]
        fingerprint = fingerprint_of(hashes if self.dtype == "float32" else [self.dtype, *hashes])
        return self.model_copy(update={"files": files, "fingerprint": fingerprint})

    def is_unchanged(self) -> bool:
        """Whether the files are those that were hashed, by name, size and time."""
        try:
            return self.files == model_files(self.folder)
        except CheckpointError:
            return False

    def save(self, folder: Path) -> None:
        """Write it to a run's folder."""
        write_atomically(folder / ORIGIN_NAME, (self.model_dump_json(indent=2) + "\n").encode())


def checked_origin(folder: Path) -> Origin | None:
    """As load_origin; raises CheckpointError if the model is another than it was, or is gone.

    Files of other sizes or times are read and hashed again. Raises CheckpointError, too, for a record in a folder that
    may come from anybody (see trust.py).
    """
    refuse_untrusted_record(folder)
    origin = load_origin(folder)
    if origin is None or origin.is_unchanged():
        return origin
    try:
        is_the_same = origin.with_fingerprint().fingerprint == origin.fingerprint
    except CheckpointError as exc:
        raise CheckpointError(
            f"{exc}; {folder} was made of it: put it back, or run `tristill teacher --force`"
        ) from exc
    if not is_the_same:
        raise CheckpointError(
            f"{origin.folder}: is another model than when {folder} was made of it; run `tristill teacher --force`, or "
            "put the model back"
        )
    return origin


def refuse_untrusted_record(folder: Path) -> None:
    """Raise CheckpointError if the folder says that its model is elsewhere and may come from anybody (trust.py)."""
    if not follows_records_of(folder) and (origin := load_origin(folder)) is not None:
        raise CheckpointError(
            f"{folder}: its {ORIGIN_NAME} names a model outside of the folder, {masked(str(origin.folder))}, and may "
            "come from anybody; if you trust it, name the config of its run with --config, or that model itself"
        )


def load_origin(folder: Path) -> Origin | None:
    """What a run's folder says; None if its model is in it."""
    path = folder / ORIGIN_NAME
    if not path.is_file():
        return None
    try:
        return Origin.model_validate_json(read_file(path))
    except (OSError, ValidationError) as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc}); run `tristill teacher --force`") from exc


def model_files(folder: Path) -> tuple[OriginFile, ...]:
    """The description, the weights in safetensors, whole or in parts, and the code that the description names.

    Raises CheckpointError if there are none.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / CONFIG_NAME).is_file():
        missing = "*.safetensors" if (folder / CONFIG_NAME).is_file() else CONFIG_NAME
        raise CheckpointError(
            f"{folder}: found no {missing}; expected a folder of transformers: config.json, tokenizer.json and weights "
            "in safetensors (pickled ones are not loaded; of a folder that has such, transformers writes one with "
            "safetensors by AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW))"
        )
    code = sorted(folder.glob("*.py")) if "auto_map" in read_config(folder / CONFIG_NAME) else []
    parts = sorted(folder.glob("*.safetensors.index.json"))
    for part in parts:
        _require_files_of_folder(part, {path.name for path in weights})
    states = [(path, path.stat()) for path in [folder / CONFIG_NAME, *weights, *parts, *code]]
    return tuple(OriginFile(name=p.name, num_bytes=s.st_size, modified_ns=s.st_mtime_ns) for p, s in states)


def _require_files_of_folder(index: Path, names: set[str]) -> None:
    """Refuses an index of weights in parts that names any other file than the weights of its own folder."""
    try:
        parts = read_json_object(index)["weight_map"]
        named = {str(name) for name in parts.values()}
    except (OSError, ValueError, KeyError, AttributeError) as exc:
        raise CheckpointError(f"{index}: cannot be read as an index of weights in parts ({exc!r})") from exc
    if others := sorted(named - names):
        raise CheckpointError(
            f"{index}: names {others[0]!r}, which is no *.safetensors of its own folder; expected some of "
            f"{', '.join(sorted(names)[:3])}"
        )


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over the description and the weights, wherever they are."""
    origin = load_origin(folder) or Origin(folder=folder).with_fingerprint()
    return origin.fingerprint


def known_fingerprint(folder: Path, dtype: Dtype = "float32") -> str | None:
    """The same; None if there is no model, as far as names of files say. dtype: of one of transformers, as loaded."""
    is_there = (folder / ORIGIN_NAME).is_file() or any(folder.glob("*.safetensors"))
    if not is_there or not (folder / CONFIG_NAME).is_file():
        return None
    origin = load_origin(folder) or Origin(folder=folder, dtype=dtype).with_fingerprint()
    return origin.fingerprint


def content_fingerprint(folder: Path, dtype: Dtype = "float32") -> str | None:
    """The same from the bytes that are there now, whatever a folder that uses its model in place says of them."""
    origin = load_origin(folder)
    if origin is None or origin.is_unchanged():
        return known_fingerprint(folder, dtype)
    return origin.with_fingerprint().fingerprint
