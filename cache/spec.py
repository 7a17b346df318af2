"""The spec: everything needed to decode a cache, repeated in the manifest and in every shard (docs/format.md)."""

import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from tristill.cache.arrays import LARGEST_VOCAB_SIZE, ArraySpec, Dataset, ids_dtype
from tristill.cache.errors import CacheCorruptError, CacheMismatchError, CacheRequestError
from tristill.cache.hashing import canonical_json
from tristill.cache.hidden import HiddenOutput, HiddenSpec
from tristill.cache.parts import MASK_NAME, Part
from tristill.cache.profiles.dense import DenseProfile
from tristill.cache.profiles.plain_topk import PlainTopKProfile
from tristill.cache.profiles.profile import Need
from tristill.cache.profiles.sampled import SampledProfile
from tristill.cache.profiles.topk import TopKProfile
from tristill.cache.profiles.transform import TransformProfile

FORMAT_VERSION = 2
MASKED_VERSION = 3
READABLE_VERSIONS = (1, FORMAT_VERSION, MASKED_VERSION)
LARGEST_CHUNK_BYTES = 2**28
MOST_WINDOWS_PER_CHUNK = 2**13
MOST_CHUNKS_PER_SHARD = 2**16
"""A reader lists the chunks of 64 shards, and the windows of 64 times 64 chunks: 300 MiB at these bounds."""
LARGEST_TABLE_BYTES = 2**32
LARGEST_NUM_CONTEXTS = 2**16
"""A reader takes 16 KiB for each."""

Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SplitName = Literal["train", "validation", "test"]
AnyProfile = Annotated[
    SampledProfile | TopKProfile | TransformProfile | DenseProfile | PlainTopKProfile, Field(discriminator="kind")
]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SplitSpec(_Strict):
    """One split of the corpus. counted_positions: of its positions, those that count; None if all do."""

    num_windows: Annotated[int, Field(ge=1)]
    bytes_per_token: Annotated[float, Field(gt=0)]
    fingerprint: Fingerprint
    counted_positions: Annotated[int | None, Field(ge=1)] = None

    @model_serializer(mode="wrap")
    def _without_a_count_if_all_count(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.counted_positions is None:
            fields.pop("counted_positions", None)
        return fields


class CacheSpec(_Strict):
    """All that a reader must know. Holds no time and no path, so equal dumps have equal bytes."""

    format_version: Literal[1, 2, 3] = 2
    vocab_size: Annotated[int, Field(ge=2, le=LARGEST_VOCAB_SIZE)]
    end_of_text_id: Annotated[int, Field(ge=0)]
    bos_id: Annotated[int | None, Field(ge=0)] = None
    context_length: Annotated[int, Field(ge=1)]
    profile: AnyProfile
    hidden: HiddenSpec | None = None
    splits: Annotated[dict[SplitName, SplitSpec], Field(min_length=1)]
    windows_per_chunk: Annotated[int, Field(ge=1, le=MOST_WINDOWS_PER_CHUNK)]
    windows_per_shard: Annotated[int, Field(ge=1)]
    teacher_fingerprint: Fingerprint
    tokenizer_fingerprint: Fingerprint
    tables_fingerprint: Fingerprint | None = None

    @model_validator(mode="before")
    @classmethod
    def _version_1_had_one_profile(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("format_version") == 1:
            profile = fields.get("profile")
            if isinstance(profile, dict) and profile.get("kind") == "topk":
                return {**fields, "profile": {**profile, "kind": "plain_topk"}}
        return fields

    @model_serializer(mode="wrap")
    def _as_its_version_wrote_it(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.bos_id is None:
            del fields["bos_id"]
        if self.format_version == 1:
            fields["profile"]["kind"] = "topk"
            del fields["tables_fingerprint"]
        return fields

    @model_validator(mode="after")
    def _profile_is_of_the_version(self) -> Self:
        if self.profile.since_version > self.format_version:
            raise ValueError(f"profile {self.profile.kind} is not part of format version {self.format_version}")
        if self.format_version == 1 and self.hidden is not None and not self.hidden.is_of_version_1:
            raise ValueError("hidden states other than float16 at every position are not part of format version 1")
        if bool(self.tables) != (self.tables_fingerprint is not None):
            raise ValueError(
                f"tables_fingerprint must be there if and only if there are tables: {len(self.tables)} here"
            )
        return self

    @model_validator(mode="after")
    def _positions_are_counted_if_masked(self) -> Self:
        for name, split in self.splits.items():
            counted, every = split.counted_positions, split.num_windows * self.context_length
            if (counted is not None) != self.is_masked:
                raise ValueError(
                    f"splits.{name}.counted_positions: found {counted} in format version {self.format_version}; it is "
                    f"there if and only if the version is {MASKED_VERSION}"
                )
            if counted is not None and counted > every:
                raise ValueError(f"splits.{name}.counted_positions: found {counted} of {every} positions")
        return self

    @model_validator(mode="after")
    def _chunks_are_of_moderate_size(self) -> Self:
        chunk_bytes = max(dataset.array.num_bytes * self.rows_per_chunk(dataset) for dataset in self.datasets)
        if chunk_bytes > LARGEST_CHUNK_BYTES:
            raise ValueError(
                f"a chunk of {self.windows_per_chunk} windows takes {chunk_bytes} bytes, expected at most "
                f"{LARGEST_CHUNK_BYTES}; keep fewer logits or hidden values per position, or shorten the context"
            )
        table_bytes = sum(table.num_bytes for table in self.tables)
        if table_bytes >= LARGEST_TABLE_BYTES:  # which HDF5 does not take as one chunk either
            raise ValueError(
                f"the tables take {table_bytes} bytes, expected fewer than {LARGEST_TABLE_BYTES}; choose a smaller "
                "basis_rank, keep fewer hidden layers, or another profile than dense, which keeps the output matrix"
            )
        contexts = sum(shape[0] for part in self.parts for shape in part.models.values())
        if contexts > LARGEST_NUM_CONTEXTS:
            raise ValueError(
                f"the models have {contexts} contexts, expected at most {LARGEST_NUM_CONTEXTS}; code fewer coefficients"
            )
        if self.end_of_text_id >= self.vocab_size:
            raise ValueError(f"end_of_text_id ({self.end_of_text_id}) must be below vocab_size ({self.vocab_size})")
        if self.bos_id is not None and self.bos_id >= self.vocab_size:
            raise ValueError(f"bos_id ({self.bos_id}) must be below vocab_size ({self.vocab_size})")
        return self

    @model_validator(mode="after")
    def _shards_hold_whole_chunks(self) -> Self:
        if self.windows_per_shard % self.windows_per_chunk:
            raise ValueError(
                f"windows_per_shard ({self.windows_per_shard}) must be a multiple of "
                f"windows_per_chunk ({self.windows_per_chunk})"
            )
        if self.windows_per_shard > (most := MOST_CHUNKS_PER_SHARD * self.windows_per_chunk):
            raise ValueError(
                f"windows_per_shard: found {self.windows_per_shard}, expected at most {MOST_CHUNKS_PER_SHARD} chunks, "
                f"which are {most * self.context_length} positions; choose a smaller shard_positions"
            )
        return self

    @property
    def parts(self) -> tuple[Part, ...]:
        """Everything that a shard holds, in order."""
        layers = self.hidden.layers if self.hidden else ()
        mask = (self.mask_part,) if self.is_masked else ()
        signals = (self.signal_part,) if self.format_version > 1 else ()
        return (self.window_part, *mask, *signals, self.target_part, *self.hidden_parts(layers))

    @property
    def is_masked(self) -> bool:
        """Whether only some positions count."""
        return self.format_version == MASKED_VERSION

    @property
    def window_part(self) -> Part:
        """The windows themselves."""
        return Part("windows", (ArraySpec("input_ids", (self.context_length + 1,), ids_dtype(self.vocab_size)),))

    @property
    def mask_part(self) -> Part:
        """Which positions count: 1 for those that do, else 0."""
        return Part(MASK_NAME, (ArraySpec(MASK_NAME, (self.context_length,), "|u1"),))

    @property
    def signal_part(self) -> Part:
        """Two numbers of the teacher's distribution at tau_dump, in steps of 1/8 nat."""
        names = ("teacher_entropy", "label_log_prob")
        return Part("signals", tuple(ArraySpec(name, (self.context_length,), "|u1") for name in names))

    @property
    def target_part(self) -> Part:
        """What the profile keeps."""
        profile = self.profile
        return Part(
            "target",
            profile.arrays(self.vocab_size, self.context_length),
            profile.models(self.vocab_size),
            profile.tables(self.vocab_size),
            profile.make_coder,
        )

    def hidden_parts(self, layers: tuple[int, ...]) -> tuple[Part, ...]:
        """One part per layer; refuses a layer that the cache does not hold."""
        if reason := self._unheld(layers):
            raise CacheRequestError(reason)
        if self.hidden is None:
            return ()
        return tuple(self.hidden.part(layer, self.vocab_size, self.context_length) for layer in layers)

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """All arrays, per window, as a writer gives them."""
        return tuple(array for part in self.parts for array in part.arrays)

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """All datasets of a shard."""
        return tuple(dataset for part in self.parts for dataset in self.datasets_of(part))

    def datasets_of(self, part: Part) -> tuple[Dataset, ...]:
        """The datasets of one part."""
        return part.datasets(self.windows_per_chunk, self.context_length)

    def rows_per_chunk(self, dataset: Dataset) -> int:
        """Rows of a dataset in each of its chunks."""
        return 1 if dataset.per_chunk else self.windows_per_chunk

    @property
    def tables(self) -> tuple[ArraySpec, ...]:
        """What is stored once for the whole cache."""
        return tuple(table for part in self.parts for table in part.stored_tables)

    def unserved(
        self,
        needs: Iterable[Need],
        hidden: Mapping[HiddenOutput, tuple[int, ...]] = MappingProxyType({}),
        *,
        signals: bool = False,
    ) -> list[str]:
        """Reasons why a student that needs all of this cannot be trained from this cache; empty when it can.

        needs: of the teacher's distribution. hidden: layers of hidden states, by output. signals: whether entropy and
        probability of the label are needed.
        """
        reasons = [self.profile.unserved(need, self.vocab_size) for need in needs]
        reasons += [self._unheld(layers, output) for output, layers in hidden.items()]
        if signals and self.format_version == 1:
            reasons.append("the teacher's entropies are asked for, which caches of format version 1 do not hold")
        return list(dict.fromkeys(reason for reason in reasons if reason))

    def _unheld(self, layers: tuple[int, ...], output: HiddenOutput | None = None) -> str | None:
        held = self.hidden.layers if self.hidden else ()
        if layers and output and self.hidden and self.hidden.output != output:
            return (
                f"hidden states of kind {output!r} are asked for, but the cache holds those of kind "
                f"{self.hidden.output!r}; dump another one with cache.hidden.output = {output!r}"
            )
        missing = [layer for layer in layers if layer not in held]
        if not missing:
            return None
        return (
            f"hidden states of layers {missing} are asked for, but the cache holds those of {list(held)}; "
            "add them to cache.hidden_layers and dump again"
        )

    def num_positions(self, split: SplitName) -> int:
        """Predictions in a split that count."""
        found = self.splits[split]
        return found.counted_positions or found.num_windows * self.context_length

    def to_json(self) -> str:
        """Canonical JSON, as stored."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str, where: str) -> "CacheSpec":
        """The validated spec; anything else is an error that names `where` it was found."""
        try:
            version = json.loads(text)["format_version"]
            if version not in READABLE_VERSIONS:
                raise CacheMismatchError(
                    f"{where}: found cache format version {version}, this program reads versions 1 to 3; "
                    "read it with the program that wrote it, or dump again into another folder"
                )
            return cls.model_validate_json(text)
        except ValidationError as exc:
            raise CacheCorruptError(f"{where}: the spec breaks the cache format:\n{describe(exc)}") from exc
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise CacheCorruptError(f"{where}: the spec is not a JSON object with a format version ({exc})") from exc


def differences(found: CacheSpec, expected: CacheSpec) -> str:
    """The fields in which two specs differ, as `path: found X, expected Y`."""
    left, right = _flatten(found.model_dump(mode="json")), _flatten(expected.model_dump(mode="json"))
    paths = sorted(path for path in left.keys() | right.keys() if left.get(path) != right.get(path))
    return "; ".join(f"{path}: found {left.get(path)}, expected {right.get(path)}" for path in paths)


def _flatten(value: object, path: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, part in value.items() for k, v in _flatten(part, f"{path}.{key}".lstrip(".")).items()}


def describe(exc: ValidationError) -> str:
    """One line per problem: dotted path, what was expected, what was found."""
    lines = []
    for problem in exc.errors(include_url=False):
        found = repr(problem["input"])
        path = ".".join(str(part) for part in problem["loc"]) or "(top)"
        lines.append(f"  {path}: {problem['msg']}; found {found if len(found) <= 80 else found[:77] + '...'}")
    return "\n".join(lines)
