"""What a build reads, held against change: a record names what was read, or is not completed.

Commands of ours are kept from changing an input by a lock on its folder. For changes by other means, and where a file
system has no locks, the states of its files are compared: of files that changed the content is read again.
"""

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tristill.cache import CacheError
from tristill.cache.hashing import sha256_of_file
from tristill.cache.manifest import load_manifest
from tristill.cache.remote import remote_copy
from tristill.pipeline.errors import MovedError, StaleError
from tristill.pipeline.provenance import PROVENANCE_NAME, held_to_read
from tristill.stages.errors import StageError
from tristill.stages.models.origin import Dtype, content_fingerprint, load_origin
from tristill.stages.progress import waiting

_NAMES_SHOWN = 6
_State = dict[Path, tuple[int, int, int, int]]


@dataclass(frozen=True)
class Input:
    """Something that a build reads: the folders it lies in, the first of which its record is in, if it has one.

    content: its fingerprint from the bytes of now, given the files that changed. checks_itself: its readers find out
    if its bytes are not those that were written.
    """

    folders: tuple[Path, ...]
    content: Callable[[Sequence[Path]], str | None]
    checks_itself: bool = False


def tokens_input(folder: Path) -> Input:
    """A tokenized corpus."""

    def content(_: Sequence[Path]) -> str | None:
        from tristill.stages.data.tokenized import content_fingerprint as fingerprint_of_tokens

        return fingerprint_of_tokens(folder)

    return Input((folder,), content)


def model_input(folder: Path, dtype: Dtype = "float32") -> Input:
    """A model's folder, and the one that it uses in place, if it does. dtype: see known_fingerprint."""
    origin = load_origin(folder)
    return Input((folder, *([origin.folder] if origin else [])), lambda _: content_fingerprint(folder, dtype))


def cache_input(folder: Path) -> Input:
    """A cache; its shards may come and go if it is a copy of one at a URL."""

    def content(changed: Sequence[Path]) -> str | None:
        manifest = load_manifest(folder)
        if remote_copy(folder) is None:
            sha256 = {record.name: record.sha256 for record in manifest.shards}
            for path in changed:
                if path.name in sha256 and path.is_file() and sha256_of_file(path) != sha256[path.name]:
                    return None
        return manifest.fingerprint

    return Input((folder,), content, checks_itself=True)


def strict_inputs(*folders: Path) -> dict[str, Input]:
    """Any folders, of which no file may change, whatever it then holds: their fingerprints are not asked for."""
    return {str(folder): Input((folder,), lambda _: None) for folder in folders}


class Reading:
    """Inputs whose folders are held, and the states of their files from before anything was read of them."""

    def __init__(self, inputs: Mapping[str, Input]) -> None:
        self._inputs = inputs
        self._before = {name: _states(given.folders) for name, given in inputs.items()}

    def refuse_tampered(self, fingerprints: Mapping[str, str]) -> None:
        """Raise StaleError if an artefact is not what its record says: files changed after the record was written."""
        for name, given in self._inputs.items():
            states, record = self._before[name], given.folders[0] / PROVENANCE_NAME
            if given.checks_itself or name not in fingerprints or record not in states:
                continue
            written_ns = states[record][-1]
            later = [path for path, state in states.items() if path.parent == record.parent and state[-1] > written_ns]
            if later and _content(given, later) != fingerprints[name]:
                raise StaleError(
                    f"{record.parent}: its files are not those that {record.name} tells of; changed since then: "
                    f"{_listed(later)}; put them back, or make them again with --force"
                )

    def refuse_moved(self, fingerprints: Mapping[str, str | None]) -> None:
        """Raise MovedError if an input is not what it was; one that is gone without another in its place still is.

        fingerprints: of the inputs that are looked at; None for those of which any change is one too many.
        """
        for name, given in self._inputs.items():
            if name not in fingerprints or not any(folder.exists() for folder in given.folders):
                continue
            before, now = self._before[name], _states(given.folders)
            changed = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
            known = fingerprints[name]
            if changed and (known is None or _content(given, changed) != known):
                raise MovedError(
                    f"{given.folders[0]}: changed while it was read ({_listed(changed)}), so nothing that was made of "
                    "it is kept; run the same command again once it stays as it is"
                )


@contextmanager
def reading(inputs: Mapping[str, Input], own: Path | None = None) -> Iterator[Reading]:
    """Hold the folders of inputs, except `own`, which is held already. BusyError if another process changes one."""
    with ExitStack() as held:
        for folder in dict.fromkeys(folder for given in inputs.values() for folder in given.folders):
            if own is None or not (own.exists() and folder.exists() and own.samefile(folder)):
                held.enter_context(held_to_read(folder))
        yield Reading(inputs)


def _content(given: Input, changed: Sequence[Path]) -> str | None:
    with waiting(f"{given.folders[0].name}: reading again what changed"):
        try:
            return given.content(changed)
        except (StageError, CacheError, OSError):
            return None  # what is there cannot be read any more


def _states(folders: Sequence[Path]) -> _State:
    """Inode, size, and times of content and of name of every file that lies in the folders and is not hidden."""
    found = {}
    for folder in folders:
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                with suppress(OSError):
                    state = entry.stat()
                    if stat.S_ISREG(state.st_mode):
                        times = (state.st_mtime_ns, state.st_ctime_ns)
                        found[Path(entry.path)] = (state.st_ino, state.st_size, *times)
    return found


def _listed(paths: Sequence[Path]) -> str:
    names = [path.name for path in paths]
    rest = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + rest
