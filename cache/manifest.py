"""`cache.json`: the list of shards with their sizes and checksums (docs/format.md, section 7)."""

import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from tristill.cache.atomic import write_atomically
from tristill.cache.calibration import Calibration
from tristill.cache.copies import copy_in
from tristill.cache.errors import CacheCorruptError, CacheMissingError, CacheRequestError
from tristill.cache.hashing import canonical_json, fingerprint_of
from tristill.cache.layout import (
    MANIFEST_NAME,
    SHARD_NAME,
    TOKENIZER_NAME,
    CompanionName,
    ShardRange,
    num_shards,
    shard_ranges,
)
from tristill.cache.regular_file import IrregularFileError, read_regular
from tristill.cache.spec import CacheSpec, Fingerprint, SplitName, describe

LARGEST_MANIFEST_BYTES = 256 * 2**20


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardRecord(_Strict):
    """One shard as it must be found on disk."""

    name: Annotated[str, Field(pattern=SHARD_NAME.pattern)]
    split: SplitName
    first_window: Annotated[int, Field(ge=0)]
    num_windows: Annotated[int, Field(ge=1)]
    file_bytes: Annotated[int, Field(ge=1)]
    sha256: Fingerprint
    stored_bytes: dict[str, Annotated[int, Field(ge=0)]]


class Manifest(_Strict):
    """What `cache.json` holds."""

    spec: CacheSpec
    shards: tuple[ShardRecord, ...]
    calibration: Calibration | None = None
    companions: dict[CompanionName, Fingerprint] = {}
    """SHA-256 of each of the files that go with the tokenizer, by name; they change no number of the cache."""

    @model_serializer(mode="wrap")
    def _as_its_version_wrote_it(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.spec.format_version == 1:
            del fields["calibration"]
        if not self.companions:
            fields.pop("companions", None)
        return fields

    @model_validator(mode="after")
    def _shards_are_those_of_the_spec(self) -> Self:
        if len(self.shards) != (expected_shards := num_shards(self.spec)):
            raise ValueError(f"found {len(self.shards)} shards, expected the {expected_shards} that the spec declares")
        names = {dataset.name for dataset in self.spec.datasets}
        if any(shard.stored_bytes.keys() != names for shard in self.shards):
            raise ValueError(f"stored_bytes must name the datasets {sorted(names)}")
        found = [(shard.name, shard.split, shard.first_window, shard.num_windows) for shard in self.shards]
        expected = [(shard.name, shard.split, shard.first_window, shard.num_windows) for shard in self.ranges]
        if found != expected:
            odd = next(pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1])
            raise ValueError(f"the list of shards does not follow from the spec: found {odd[0]}, expected {odd[1]}")
        return self

    @property
    def copied(self) -> dict[str, str]:
        """SHA-256 of the tokenizer and of the files that go with it, by name."""
        return {TOKENIZER_NAME: self.spec.tokenizer_fingerprint, **dict[str, str](self.companions.items())}

    @property
    def ranges(self) -> list[ShardRange]:
        """The shards' windows, in the order of `shards`."""
        return list(shard_ranges(self.spec))

    @property
    def fingerprint(self) -> str:
        """That of the cache: the manifest holds the hash of every shard."""
        return fingerprint_of(self.model_dump(mode="json", exclude={"companions"}))

    def to_json(self) -> str:
        """Canonical JSON, as stored."""
        return canonical_json(self.model_dump(mode="json"))


def refuse_too_many_shards(spec: CacheSpec) -> None:
    """Raises CacheRequestError, before anything is dumped, if the manifest would be larger than readers take."""
    longest = ShardRecord(
        name="validation-00000000.h5",
        split="validation",
        first_window=2**40,
        num_windows=spec.windows_per_shard,
        file_bytes=2**40,
        sha256="0" * 64,
        stored_bytes={dataset.name: 2**40 for dataset in spec.datasets},
    )
    found, most = (
        num_shards(spec),
        LARGEST_MANIFEST_BYTES // len(canonical_json(longest.model_dump(mode="json")) + ","),
    )
    if found > most:
        positions = spec.windows_per_shard * spec.context_length
        enough = 1 << math.ceil(positions * found / most).bit_length()
        raise CacheRequestError(
            f"the cache would have {found} shards of {positions} positions, expected at most {most}, which is what "
            f"{MANIFEST_NAME} has room for; set cache.shard_positions to {enough}"
        )


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit the cache: from here on it is complete."""
    write_atomically(folder / MANIFEST_NAME, manifest.to_json().encode("ascii"))


def cache_fingerprint(folder: Path) -> str | None:
    """That of the cache in `folder`, None if there is no complete one with a sound manifest."""
    try:
        return load_manifest(folder).fingerprint
    except (CacheMissingError, CacheCorruptError):
        return None


def load_manifest(folder: Path) -> Manifest:
    """The checked manifest of a complete cache, brought from its URL first if the folder is a copy."""
    if copy := copy_in(folder):
        copy.refresh()
    path = folder / MANIFEST_NAME
    try:
        content = read_regular(path, LARGEST_MANIFEST_BYTES)
    except FileNotFoundError as exc:
        num_shards = len([p for p in folder.glob("*.h5") if SHARD_NAME.match(p.name)]) if folder.is_dir() else 0
        found = f"an unfinished cache of {num_shards} shards" if num_shards else "no cache"
        lost = f", or `tristill cache repair` if only {MANIFEST_NAME} was lost" if num_shards else ""
        raise CacheMissingError(
            f"{folder}: found {found}; run `tristill dump-logits` to make or finish it{lost}"
        ) from exc
    except IrregularFileError as exc:
        raise CacheCorruptError(
            f"{path}: {exc}; delete it, and run `tristill cache repair`, which makes it again from the shards"
        ) from exc
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as exc:
        raise CacheCorruptError(
            f"{path}: the manifest breaks the cache format:\n{describe(exc)}\n"
            "run `tristill cache repair`, which makes it again from the shards"
        ) from exc
