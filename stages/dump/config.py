"""Settings of the cache and of the dump that writes it."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from cache.topk import TopKProfile
from stages.settings import Section, neutral


class DumpConfig(Section):
    """What the teacher's knowledge is kept as, and where."""

    dir: Annotated[Path | None, neutral("folder of the cache; none is `cache` in the run folder")] = None
    profile: Annotated[TopKProfile, Field(description="what is kept at each position")] = TopKProfile()
    hidden_layers: Annotated[
        tuple[int, ...],
        Field(description="blocks whose outputs are kept too, by number from 1 (0 is the embedding), as float16"),
    ] = ()
    max_train_windows: Annotated[
        int | None, Field(ge=1, description="windows of the train split that students see; none takes all")
    ] = None
    shard_positions: Annotated[int, Field(ge=1, description="positions per shard, about")] = 2**17
    batch_windows: Annotated[int, Field(ge=1, description="windows per forward pass of the teacher")] = 16
    precision: Annotated[
        Literal["float32", "bfloat16"], Field(description="bfloat16: matrix products of the teacher under autocast")
    ] = "float32"
    compression_level: Annotated[int, Field(ge=1, le=22, description="Zstandard level")] = 3
    device: Annotated[str | None, neutral("cpu, cuda, cuda:1 ..; none takes CUDA if there is one")] = None

    @field_validator("hidden_layers")
    @classmethod
    def _layers_are_distinct(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) != len(layers) or any(layer < 0 for layer in layers):
            raise ValueError("layers must be distinct and not negative")
        return tuple(sorted(layers))
