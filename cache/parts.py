"""A shard's parts: what a reader can ask for by itself, and how it lies in datasets.

    windows     input_ids
    mask        mask: which positions count (format version 3)
    signals     teacher_entropy, label_log_prob (format version 2)
    target      the profile's arrays
    hidden_<l>  the states of one layer

A part is plain, one dataset per array, or coded: one dataset of bytes, a row per chunk, which a Coder turns into
arrays. Of positions that do not count, a coded part holds nothing, and a plain one zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tristill.cache.arrays import ArraySpec, Dataset
from tristill.cache.coding.frequencies import Model
from tristill.cache.coding.rans import Decoder, Encoder, read_in_step
from tristill.cache.profiles.profile import NUM_LANES, Coder, Place

SIGNAL_STEP_NATS = 1 / 8
MASK_NAME = "mask"
_POSITIONS_PER_LANE = 8
_FEWEST_LANES = 32


@dataclass(frozen=True)
class Part:
    """`models` of the entropy coder by name: (contexts, tokens). `coder` makes one from tables; None if plain.

    stride: of every window it has positions 0, stride, 2 stride, ..
    """

    name: str
    arrays: tuple[ArraySpec, ...]
    models: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tables: tuple[ArraySpec, ...] = ()
    coder: Callable[[Mapping[str, np.ndarray]], Coder] | None = None
    stride: int = 1

    @property
    def is_coded(self) -> bool:
        """Whether it takes a coder to read it."""
        return self.coder is not None

    def datasets(self, windows_per_chunk: int, context_length: int) -> tuple[Dataset, ...]:
        """Its datasets in a shard."""
        if not self.is_coded:
            return tuple(Dataset(array) for array in self.arrays)
        capacity = self.capacity(windows_per_chunk, context_length)
        return (Dataset(ArraySpec(self.name, (capacity,), "|u1"), per_chunk=True),)

    def capacity(self, windows_per_chunk: int, context_length: int) -> int:
        """Bytes of a coded chunk before the zeros at its end are compressed away: more than any payload takes.

        A value takes at most 12 bits of its token and as many raw bits as its type has.
        """
        per_window = 2 * sum(array.num_bytes for array in self.arrays) + 8 * context_length
        return 8 + 4 * NUM_LANES + per_window * windows_per_chunk

    @property
    def stored_tables(self) -> tuple[ArraySpec, ...]:
        """Its tables and models as they are named in the file of tables."""
        named = [ArraySpec(f"{self.name}.{table.name}", table.shape, table.dtype) for table in self.tables]
        return (*named, *(ArraySpec(f"{self.name}.{name}", shape, "<u2") for name, shape in self.models.items()))

    def own_tables(self, tables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Its tables and models by their own names."""
        prefix = f"{self.name}."
        return {name.removeprefix(prefix): table for name, table in tables.items() if name.startswith(prefix)}


class PartCoder:
    """A coded part's arrays to payloads and back."""

    def __init__(self, part: Part, tables: Mapping[str, np.ndarray]) -> None:
        """`tables` are those of the whole cache. Raises CacheCorruptError if they make no sense."""
        assert part.coder is not None, "plain parts need no coder"
        own = part.own_tables(tables)
        self._part = part
        self._coder = part.coder(own)
        self._models = {name: Model(own[name]) for name in part.models}

    def encode(self, arrays: Mapping[str, np.ndarray], place: Place) -> bytes:
        """The payload of consecutive windows, arrays (P, T', ..); of no positions, one without symbols."""
        place = place.strided(self._part.stride)
        encoder = Encoder(self._models, num_lanes(place))
        if place.num_positions:
            self._coder.write({name: place.gathered(array) for name, array in arrays.items()}, place, encoder)
        return encoder.finish()

    def decode(self, payload: np.ndarray, place: Place) -> dict[str, np.ndarray]:
        """The arrays (P, T', ..) of the windows of `place`, zero at positions that do not count."""
        return self.decode_together([payload], [place])[0]

    def decode_together(self, payloads: Sequence[np.ndarray], places: Sequence[Place]) -> list[dict[str, np.ndarray]]:
        """The same of several chunks: faster than one by one, and with the same result."""
        places = [place.strided(self._part.stride) for place in places]
        decoders = [Decoder(self._models, payload, num_lanes(p)) for payload, p in zip(payloads, places, strict=True)]
        nothing = {array.name: np.zeros((0, *array.shape[1:]), array.dtype) for array in self._part.arrays}
        found = [nothing] * len(places)
        for lanes in {num_lanes(place) for place in places}:
            alike = [i for i, place in enumerate(places) if num_lanes(place) == lanes and place.num_positions]
            readings = [self._coder.read(places[i]) for i in alike]
            for i, flat in zip(alike, read_in_step([decoders[i] for i in alike], readings), strict=True):
                found[i] = flat
        return [
            {name: place.scattered(array) for name, array in flat.items()}
            for place, flat in zip(places, found, strict=True)
        ]


def num_lanes(place: Place) -> int:
    """Lanes of a chunk: 1024; of a masked one as many as have at least 8 positions each, a power of two, at least 32.

    The state of a lane takes four bytes, which few positions would not be worth.
    """
    if place.counts_PT is None:
        return NUM_LANES
    lanes = 1 << max(0, (place.num_positions // _POSITIONS_PER_LANE).bit_length() - 1)
    return min(NUM_LANES, max(_FEWEST_LANES, lanes))


class Parts(Protocol):
    """What has parts: a spec."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Everything that a shard holds, in order."""
        ...


def part_coders(spec: Parts, tables: Mapping[str, np.ndarray]) -> dict[str, PartCoder]:
    """The coders of all coded parts, by name of the part."""
    return {part.name: PartCoder(part, tables) for part in spec.parts if part.coder is not None}
