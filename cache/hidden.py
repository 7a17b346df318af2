"""What is kept of the teacher's hidden states (docs/format.md, section 6).

Shapes: T' kept positions of a window, D width of the states, K width after a reduction, R coded coefficients of a
layer, V vocabulary.
"""

from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from tristill.cache.arrays import ArraySpec
from tristill.cache.hidden_coder import HiddenCoder, coefficient_models
from tristill.cache.parts import Part

TABLE_UNITS_PER_STEP = 8
BASIS_UNIT = 2.0**-15
NUM_ACTIVITIES = 4


HiddenOutput = Literal["residual", "attention", "mlp", "qkv"]
"""Of a block: the residual stream after it, what its attention or MLP adds, or queries, keys and values in a row."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Reduction(_Strict):
    """A fixed orthogonal projection to fewer dimensions; its transpose leads back to all of them."""

    kind: Annotated[
        Literal["pca", "seeded"],
        Field(description="pca: directions of the largest variance in the calibration; seeded: random ones"),
    ]
    width: Annotated[int, Field(ge=1, description="K, dimensions that are kept")]
    seed: Annotated[int, Field(ge=0, description="seed of the random directions; pca has none")] = 0

    @model_validator(mode="after")
    def _only_random_directions_have_a_seed(self) -> Self:
        if self.kind == "pca" and self.seed:
            raise ValueError(f"found seed {self.seed} with kind pca, which is not random; leave it out")
        return self


class Float16Hidden(_Strict):
    """Every value in 16 bits."""

    kind: Annotated[Literal["float16"], Field(description="name of the coding")] = "float16"
    reduction: Annotated[Reduction | None, Field(description="projection before storing; none keeps all")] = None


class Float32Hidden(_Strict):
    """Every value in 32 bits: residual streams that pass 65504, where float16 ends."""

    kind: Annotated[Literal["float32"], Field(description="name of the coding")] = "float32"
    reduction: Annotated[Reduction | None, Field(description="projection before storing; none keeps all")] = None


class Int8Hidden(_Strict):
    """Every value in 8 bits, in units of a scale per position."""

    kind: Annotated[Literal["int8"], Field(description="name of the coding")] = "int8"
    reduction: Annotated[Reduction | None, Field(description="projection before storing; none keeps all")] = None


class CodedLayer(_Strict):
    """Of one layer: `step` of the coefficients in units of the states, `rank` R of them per position."""

    step: Annotated[float, Field(gt=0)]
    rank: Annotated[int, Field(ge=1)]


class TransformHidden(_Strict):
    """Transform coded: what the input id does not already say, in its Karhunen-Loeve basis, entropy coded.

    coded: of every layer, in their order. delta: what the layer before in that order does not already say either.
    """

    kind: Literal["transform"] = "transform"
    delta: bool
    coded: Annotated[tuple[CodedLayer, ...], Field(min_length=1)]


HiddenCoding = Annotated[Float16Hidden | Float32Hidden | Int8Hidden | TransformHidden, Field(discriminator="kind")]


class HiddenSpec(_Strict):
    """Hidden states that are stored: one kind of output of each listed block.

    width: of one state; with qkv that of queries, keys and values together, and query_width that of queries. stride:
    of every window, positions 0, stride, 2 stride, .. are kept.
    """

    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    width: Annotated[int, Field(ge=1)]
    stride: Annotated[int, Field(ge=1)] = 1
    coding: HiddenCoding = Float16Hidden()
    output: HiddenOutput = "residual"
    query_width: Annotated[int | None, Field(ge=1)] = None

    @model_serializer(mode="wrap")
    def _without_what_version_1_meant(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.is_of_version_1:
            return {name: fields[name] for name in ("layers", "width")}
        if self.output == "residual":
            del fields["output"]  # as caches were written before there were others
        if self.query_width is None:
            del fields["query_width"]
        return fields

    @model_validator(mode="after")
    def _layers_are_distinct(self) -> Self:
        if len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise ValueError(f"hidden layers must be distinct and not negative, found {list(self.layers)}")
        if 0 in self.layers and self.output != "residual":
            raise ValueError(f"layer 0 is the embedding and has no output {self.output!r}; layers count from 1")
        if (self.query_width is not None) != (self.output == "qkv") or (self.query_width or 0) > self.width:
            raise ValueError(f"found query_width {self.query_width} with output {self.output!r} and width {self.width}")
        return self

    @model_validator(mode="after")
    def _coding_fits_layers_and_width(self) -> Self:
        if isinstance(self.coding, TransformHidden):
            if len(self.coding.coded) != len(self.layers):
                raise ValueError(f"found {len(self.coding.coded)} coded layers, expected {len(self.layers)}")
            widths = [layer.rank for layer in self.coding.coded]
        else:
            widths = [self.coding.reduction.width] if self.coding.reduction else []
        if widths and max(widths) > self.width:
            raise ValueError(f"found {max(widths)} dimensions of hidden states, expected at most their {self.width}")
        return self

    @property
    def is_of_version_1(self) -> bool:
        """Whether format version 1 can hold it."""
        return self.stride == 1 and self.coding == Float16Hidden() and self.output == "residual"

    @property
    def has_scales(self) -> bool:
        """Whether every position has a scale."""
        return isinstance(self.coding, Int8Hidden)

    def num_kept(self, context_length: int) -> int:
        """T' = ceil(T / stride)."""
        return -(-context_length // self.stride)

    def layers_to_read(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """The stored layers without which these cannot be known: with delta, all up to the last of them."""
        if isinstance(self.coding, TransformHidden) and self.coding.delta and layers:
            last = max(self.layers.index(layer) for layer in layers)
            return self.layers[: last + 1]
        return layers

    def part(self, layer: int, vocab_size: int, context_length: int) -> Part:
        """How one layer lies in a shard and in the tables."""
        name, kept = f"hidden_{layer}", self.num_kept(context_length)
        match self.coding:
            case TransformHidden():
                return self._coded_part(name, self.layers.index(layer), vocab_size, kept)
            case Float16Hidden() | Float32Hidden():
                dtype = "<f2" if isinstance(self.coding, Float16Hidden) else "<f4"
                arrays: tuple[ArraySpec, ...] = (ArraySpec(name, (kept, self._stored_width), dtype),)
            case Int8Hidden():
                scale = ArraySpec(f"{name}_scale", (kept,), "<f2")
                arrays = (ArraySpec(name, (kept, self._stored_width), "|i1"), scale)
        if self.coding.reduction is None:
            return Part(name, arrays, stride=self.stride)
        basis = ArraySpec("basis", (self._stored_width, self.width), "<i2")
        return Part(name, arrays, tables=(ArraySpec("mean", (self.width,), "<f4"), basis), stride=self.stride)

    @property
    def _stored_width(self) -> int:
        assert not isinstance(self.coding, TransformHidden), "its layers have ranks of their own"
        return self.coding.reduction.width if self.coding.reduction else self.width

    def _coded_part(self, name: str, place: int, vocab_size: int, kept: int) -> Part:
        assert isinstance(self.coding, TransformHidden), "asked for by part"
        rank = self.coding.coded[place].rank
        tables = [
            ArraySpec("mean", (self.width,), "<f4"),
            ArraySpec("basis", (self.width, self.width), "<i2"),
            ArraySpec("table", (vocab_size, self.width), "<i2"),
            ArraySpec("activity_edges", (NUM_ACTIVITIES - 1,), "<i4"),
        ]
        if self.coding.delta and place > 0:
            tables.append(ArraySpec("map", (self.width, self.width), "<f2"))
        return Part(
            name,
            (ArraySpec(name, (kept, rank), "<i2"),),
            coefficient_models(rank, NUM_ACTIVITIES),
            tuple(tables),
            partial(HiddenCoder, name, rank, NUM_ACTIVITIES),
            stride=self.stride,
        )
