"""Repairs a cache: its manifest from the shards, its tokenizer from the run, the rest by dumping it again."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tristill.cache import CacheCorruptError, CacheError, CacheMismatchError, CacheMissingError, CacheSpec
from tristill.cache.layout import MANIFEST_NAME, SHARD_NAME, TABLES_NAME
from tristill.cache.manifest import Manifest, load_manifest, save_manifest
from tristill.cache.remote import remote_copy
from tristill.cache.repair import lend_good_files, manifest_of_shards, restore_copy, take_back
from tristill.cache.spec import FORMAT_VERSION, MASKED_VERSION
from tristill.cache.tables import stored_calibration
from tristill.cache.verify import Damage, find_damage, tokenizer_damage
from tristill.pipeline.errors import RepairError, StaleError
from tristill.pipeline.provenance import Provenance, differences, locked, new_provenance, read_provenance
from tristill.pipeline.reading import reading
from tristill.pipeline.steps import DumpLogits
from tristill.pipeline.workspace import Workspace
from tristill.stages.progress import Progress

Report = Callable[[str, str], None]
RunOf = Callable[[], Workspace]
_NAMES_SHOWN = 5


def repair_cache(folder: Path, run_of: RunOf, tell: Callable[[str], object]) -> bool:
    """Make every byte of the cache what the dump wrote; whether anything had to be done for that.

    `tell` is given one line per file that was repaired. `run_of` gives the run that made the cache, at its link, and is
    asked only if something of it is needed. A file is replaced only by bytes whose SHA-256 the manifest holds. Raises
    RepairError for what could not be repaired, after all else was.
    """
    repaired: list[str] = []

    def report(name: str, how: str) -> None:
        repaired.append(name)
        tell(f"{name}: {how}")

    if copy := remote_copy(folder):
        raise RepairError(
            f"{copy.store.url}: a cache at a URL is repaired by deleting there what `tristill cache verify` says is "
            "damaged, and running `tristill dump-logits` with this cache.url, which writes only what is missing"
        )
    if not folder.is_dir():
        raise CacheMissingError(f"{folder}: found no cache; run `tristill dump-logits` to make one")
    with locked(folder):
        manifest, damages = _sound_manifest(folder, report)
        damaged = [damage.name for damage in damages]
        for name in (taken := take_back(folder, manifest, damaged)):
            report(name, "written by a repair that was interrupted, now in its place")
        left = [damage for damage in damages if damage.name not in taken]
        copies = manifest.copied
        copied = {damage.name: copies[damage.name] for damage in left if damage.name in copies}
        dumped = [damage.name for damage in left if damage.name not in copies]
        problems = [_copy_problem(folder, name, copied[name], run_of(), report) for name in copied]
        problems += [_write_again(folder, manifest, dumped, run_of(), report)] if dumped else []
    if problems := [problem for problem in problems if problem]:
        raise RepairError("\n".join(problems))
    return bool(repaired)


def _sound_manifest(folder: Path, report: Report) -> tuple[Manifest, list[Damage]]:
    """A manifest to trust, repaired if need be, and what differs from it."""
    try:
        manifest = load_manifest(folder)
    except (CacheMissingError, CacheCorruptError):
        manifest = _read_shards(folder)
        save_manifest(folder, manifest)
        report(MANIFEST_NAME, f"made again from the {len(manifest.shards)} shards")
        return manifest, tokenizer_damage(folder, manifest)
    damages = _damage(folder, manifest)
    if any(damage.name == MANIFEST_NAME for damage in damages):
        manifest = manifest.model_copy(update={"calibration": stored_calibration(folder, manifest.spec)})
        save_manifest(folder, manifest)
        report(MANIFEST_NAME, f"its calibration taken from {TABLES_NAME} again")
        damages = [damage for damage in damages if damage.name != MANIFEST_NAME]
    doubts = [damage for damage in damages if SHARD_NAME.match(damage.name)]
    if not doubts or not all(damage.is_whole for damage in doubts):
        return manifest, damages
    try:
        found = _read_shards(folder)
    except CacheError:
        return manifest, damages
    if not _is_what_was_dumped(found, manifest, _record(folder)):
        return manifest, damages
    found = found.model_copy(update={"companions": manifest.companions})
    save_manifest(folder, found)
    report(MANIFEST_NAME, f"did not fit the {len(found.shards)} shards, which are whole; made again from them")
    return found, tokenizer_damage(folder, found)


def _is_what_was_dumped(found: Manifest, manifest: Manifest, recorded: Provenance | None) -> bool:
    """Whether `found`, made from whole shards, is right and `manifest`, as it stands on disk, is wrong.

    Either the record of provenance says so, or the manifest itself, by holding the SHA-256 of all shards.
    """
    return found.shards == manifest.shards or (recorded is not None and recorded.fingerprint == found.fingerprint)


def _copy_problem(folder: Path, name: str, sha256: str, workspace: Workspace, report: Report) -> str | None:
    """Copies the tokenizer, or what goes with it, from the run; what is in the way of that."""
    for source in (workspace.data / name, workspace.teacher / name):
        if restore_copy(folder, source, sha256):
            report(name, f"copied from {source}")
            return None
    return (
        f"{folder / name}: is missing or damaged, and neither {workspace.data} nor {workspace.teacher} has the one "
        f"with SHA-256 {sha256}; name the run that has it with --config and --run-dir, or copy it there yourself"
    )


def _write_again(
    folder: Path, manifest: Manifest, damaged: list[str], workspace: Workspace, report: Report
) -> str | None:
    """Dumps the damaged files in a scratch folder and takes those that are as before; what is in the way of that."""
    DumpLogits(workspace).refuse_outside()
    names = _listed(damaged)
    recorded = _record(folder)
    if problems := list(_other_origin(workspace, manifest.spec, recorded)):
        return (
            f"{folder}: could not repair {names}: it takes what made them:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\nname the run that has it with --config and --run-dir, and run `tristill cache repair` again"
        )
    scratch = lend_good_files(folder, manifest, damaged)
    dump = DumpLogits(workspace)
    try:
        with reading(dump.reads(), folder):  # by its bytes a file is known to be what it was
            dump.dump_into(scratch)
    except CacheMismatchError as exc:
        return f"{folder}: could not repair {names}: the run in {workspace.run_dir} makes another cache: {exc}"
    finally:
        for name in (taken := take_back(folder, manifest, damaged)):
            report(name, f"written again by the teacher, with the SHA-256 that {MANIFEST_NAME} holds")
    if other := [name for name in damaged if name not in taken]:
        return (
            f"{folder}: could not repair {_listed(other)}: the teacher gives other bytes than those whose SHA-256 "
            f"{MANIFEST_NAME} holds{_changed_versions(recorded)}, as it may on other hardware; repair it where it was "
            "made, or delete these files and run `tristill dump-logits`, which makes another cache from what the "
            "teacher gives here"
        )
    return None


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + rest


def _other_origin(workspace: Workspace, spec: CacheSpec, recorded: Provenance | None) -> Iterator[str]:
    """What of the run is not what the cache was made from, one line each."""
    from tristill.stages.data.tokenized import load_corpus
    from tristill.stages.errors import CorpusError
    from tristill.stages.models.origin import known_fingerprint

    if spec.format_version not in (FORMAT_VERSION, MASKED_VERSION):
        yield f"the program that wrote format version {spec.format_version}; this one writes version {FORMAT_VERSION}"
    try:
        corpus = load_corpus(workspace.data)
    except CorpusError as exc:
        yield f"the token files: {exc}"
    else:
        for split, declared in spec.splits.items():
            held = corpus.splits.get(split)
            found = corpus.windows_fingerprint(split, declared.num_windows) if held else None
            if found != declared.fingerprint:
                yield f"{workspace.data}: found split {split} with fingerprint {found}, expected {declared.fingerprint}"
    dump = DumpLogits(workspace)
    members = dump.config.cache.ensemble
    own = known_fingerprint(workspace.teacher)
    teacher = own and dump.config.cache.teacher_fingerprint(own)
    if teacher != spec.teacher_fingerprint:
        places = ", ".join(map(str, (workspace.teacher, *(member.path for member in members))))
        what = "ensemble" if members else "teacher"
        article = "an" if members else "a"
        found = f"{article} {what} with fingerprint {teacher}" if teacher else f"no {what}"
        yield f"{places}: found {found}, expected the one with fingerprint {spec.teacher_fingerprint}"
    if recorded:
        yield from differences(recorded, dump.settings(), {})


def _record(folder: Path) -> Provenance | None:
    """The record of the dump; a repair does without one that is missing or cannot be read."""
    try:
        return read_provenance(folder)
    except StaleError:
        return None


def _changed_versions(recorded: Provenance | None) -> str:
    """Packages that are not those of the dump, in brackets; nothing if all are."""
    here = new_provenance("cache repair", {}, {}).versions
    there = recorded.versions if recorded else {}
    common = sorted(here.keys() & there.keys())
    changed = [f"{name} {there[name]} there, {here[name]} here" for name in common if there[name] != here[name]]
    return f" ({'; '.join(changed)})" if changed else ""


def _read_shards(folder: Path) -> Manifest:
    with Progress("verify", sum(path.lstat().st_size for path in folder.glob("*-*.h5")), "bytes") as progress:
        return manifest_of_shards(folder, progress.advance)


def _damage(folder: Path, manifest: Manifest) -> list[Damage]:
    with Progress("verify", sum(shard.file_bytes for shard in manifest.shards), "bytes") as progress:
        return find_damage(folder, manifest, progress.advance)
