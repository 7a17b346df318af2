"""The spec: everything needed to decode a cache, repeated in the manifest and in every shard (docs/format.md)."""

import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cache.arrays import LARGEST_VOCAB_SIZE, ArraySpec, ids_dtype
from cache.errors import CacheCorruptError, CacheMismatchError, CacheRequestError
from cache.hashing import canonical_json
from cache.topk import TopKProfile

FORMAT_VERSION = 1
LARGEST_CHUNK_BYTES = 2**28

Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SplitName = Literal["train", "validation"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HiddenSpec(_Strict):
    """Hidden states that are stored: outputs of the residual stream after each listed block."""

    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    width: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _layers_are_distinct(self) -> Self:
        if len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise ValueError(f"hidden layers must be distinct and not negative, found {list(self.layers)}")
        return self


class SplitSpec(_Strict):
    """One split of the corpus."""

    num_windows: Annotated[int, Field(ge=1)]
    bytes_per_token: Annotated[float, Field(gt=0)]
    fingerprint: Fingerprint


class CacheSpec(_Strict):
    """All that a reader must know. Holds no time and no path, so equal dumps have equal bytes."""

    format_version: Literal[1] = 1
    vocab_size: Annotated[int, Field(ge=2, le=LARGEST_VOCAB_SIZE)]
    end_of_text_id: Annotated[int, Field(ge=0)]
    context_length: Annotated[int, Field(ge=1)]
    profile: TopKProfile
    hidden: HiddenSpec | None = None
    splits: Annotated[dict[SplitName, SplitSpec], Field(min_length=1)]
    windows_per_chunk: Annotated[int, Field(ge=1)]
    windows_per_shard: Annotated[int, Field(ge=1)]
    teacher_fingerprint: Fingerprint
    tokenizer_fingerprint: Fingerprint

    @model_validator(mode="after")
    def _chunks_are_of_moderate_size(self) -> Self:
        largest = max(array.window_bytes for array in self.arrays) * self.windows_per_chunk
        if largest > LARGEST_CHUNK_BYTES:
            raise ValueError(
                f"a chunk of {self.windows_per_chunk} windows takes {largest} bytes, expected at most "
                f"{LARGEST_CHUNK_BYTES}; keep fewer logits or hidden values per position, or shorten the context"
            )
        if self.end_of_text_id >= self.vocab_size:
            raise ValueError(f"end_of_text_id ({self.end_of_text_id}) must be below vocab_size ({self.vocab_size})")
        return self

    @model_validator(mode="after")
    def _shards_hold_whole_chunks(self) -> Self:
        if self.windows_per_shard % self.windows_per_chunk:
            raise ValueError(
                f"windows_per_shard ({self.windows_per_shard}) must be a multiple of "
                f"windows_per_chunk ({self.windows_per_chunk})"
            )
        return self

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """Every dataset of a shard: the windows, the profile's, the hidden states."""
        ids = ArraySpec("input_ids", (self.context_length + 1,), ids_dtype(self.vocab_size))
        return (ids, *self.target_arrays, *self.hidden_arrays(self.hidden.layers if self.hidden else ()))

    @property
    def target_arrays(self) -> tuple[ArraySpec, ...]:
        """The datasets of the profile."""
        return self.profile.arrays(self.vocab_size, self.context_length)

    def hidden_arrays(self, layers: tuple[int, ...]) -> tuple[ArraySpec, ...]:
        """The datasets of these hidden layers; refuses a layer that the cache does not hold."""
        if reason := self._unheld(layers):
            raise CacheRequestError(reason)
        width = self.hidden.width if self.hidden else 0
        return tuple(ArraySpec(f"hidden_{layer}", (self.context_length, width), "<f2") for layer in layers)

    def unserved(self, temperature: float | None, hidden_layers: tuple[int, ...]) -> list[str]:
        """Reasons why a student that needs these signals cannot be trained from this cache; empty when it can.

        `temperature` None means that the teacher's distribution is not needed.
        """
        reasons = (
            None if temperature is None else self.profile.unserved(temperature, self.vocab_size),
            self._unheld(hidden_layers),
        )
        return [reason for reason in reasons if reason]

    def _unheld(self, layers: tuple[int, ...]) -> str | None:
        held = self.hidden.layers if self.hidden else ()
        missing = [layer for layer in layers if layer not in held]
        if not missing:
            return None
        return (
            f"hidden states of layers {missing} are asked for, but the cache holds those of {list(held)}; "
            "add them to cache.hidden_layers and dump again"
        )

    def num_positions(self, split: SplitName) -> int:
        """Predictions in a split."""
        return self.splits[split].num_windows * self.context_length

    def to_json(self) -> str:
        """Canonical JSON, as stored."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str, where: str) -> "CacheSpec":
        """The validated spec; anything else is an error that names `where` it was found."""
        try:
            version = json.loads(text)["format_version"]
            if version != FORMAT_VERSION:
                raise CacheMismatchError(
                    f"{where}: found cache format version {version}, this program reads version {FORMAT_VERSION}; "
                    "read it with the program that wrote it, or dump again into another folder"
                )
            return cls.model_validate_json(text)
        except ValidationError as exc:
            raise CacheCorruptError(f"{where}: the spec breaks the cache format:\n{describe(exc)}") from exc
        except (ValueError, KeyError, TypeError) as exc:
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
