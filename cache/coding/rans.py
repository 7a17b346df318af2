"""Range asymmetric numeral systems over many lanes at once: each numpy call codes one symbol in every lane.

Duda 2013 (arXiv 1311.2540); interleaving as in Giesen 2014 (arXiv 1402.3392). A lane's state x is in [2^16, 2^32); it
is refilled by words of 16 bits. Lane i mod L codes symbol i of every call, so the number of lanes is free of the
shape of the data: a call codes its symbols in rounds of L.

Payload: `num_words` and `num_raw_bytes` as <u4, L states as <u4, the words as <u2, the raw bits.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from tristill.cache.coding.frequencies import PROBABILITY_BITS, TOTAL, Model
from tristill.cache.coding.integers import (
    NUM_DIRECT,
    pack_bits,
    raw_bit_counts,
    tokens_of,
    unpack_bits,
    values_of,
    words_at_bytes,
)
from tristill.cache.coding.streams import Reading, Request
from tristill.cache.errors import CacheCorruptError

T = TypeVar("T")

_LOWEST_STATE = 1 << 16
_WORD_BITS = np.uint32(16)
_SLOT_BITS = np.uint32(PROBABILITY_BITS)
_SLOT_MASK = np.uint32(TOTAL - 1)
_TOKEN_BYTE = 3  # of a slot's word, in little-endian order
_FULL_SHIFT = np.uint32(32 - PROBABILITY_BITS)
_WORD_MASK = np.uint32(0xFFFF)
_HEADER_BYTES = 8


class Encoder:
    """Collects integers in the order in which a Decoder will ask for them; `finish` gives the payload."""

    def __init__(self, models: Mapping[str, Model], num_lanes: int) -> None:
        self._models = models
        self._num_lanes = num_lanes
        self._calls: list[tuple[np.ndarray, np.ndarray]] = []  # frequency and start of every symbol
        self._raw_values: list[np.ndarray] = []
        self._raw_counts: list[np.ndarray] = []

    def write(self, name: str, values: np.ndarray, contexts: np.ndarray | int = 0) -> None:
        """Code `values` (n,) >= 0 with one of the models, each in its context."""
        model = self._models[name]
        tokens = tokens_of(values)
        counts = raw_bit_counts(tokens)
        places = np.asarray(contexts) * model.num_tokens + tokens
        self._calls.append((model.frequencies[places], model.starts[places]))
        long = counts > 0
        self._raw_counts.append(counts[long])
        self._raw_values.append((values[long]) & ((np.int64(1) << counts[long]) - 1))

    def finish(self) -> bytes:
        """The payload. Lanes run backwards, since rANS is last in, first out."""
        states = np.full(self._num_lanes, _LOWEST_STATE, np.uint32)
        rounds: list[np.ndarray] = []
        for frequencies, starts in reversed(self._calls):
            num_rounds = -(-len(frequencies) // self._num_lanes)
            for first in range((num_rounds - 1) * self._num_lanes, -1, -self._num_lanes):
                part = slice(first, first + self._num_lanes)
                frequency, start = frequencies[part], starts[part]
                state = states[: len(frequency)]
                full = np.flatnonzero(state >= frequency << _FULL_SHIFT)
                rounds.append((state[full] & _WORD_MASK).astype("<u2"))
                state[full] >>= _WORD_BITS
                quotient, remainder = np.divmod(state, frequency)
                state[:] = (quotient << _SLOT_BITS) + remainder + start
        words = np.concatenate(rounds[::-1]) if rounds else np.zeros(0, "<u2")
        raw = pack_bits(
            np.concatenate(self._raw_values or [np.zeros(0, np.int64)]),
            np.concatenate(self._raw_counts or [np.zeros(0, np.int64)]),
        )
        header = np.array([len(words), len(raw)], "<u4")
        return header.tobytes() + states.astype("<u4").tobytes() + words.tobytes() + raw


class Decoder:
    """Reads what an Encoder wrote, call by call. Never reads past the payload: damage is a CacheCorruptError."""

    def __init__(self, models: Mapping[str, Model], payload: np.ndarray, num_lanes: int) -> None:
        """`payload` is uint8, (n,); bytes after its end are ignored."""
        states_end = _HEADER_BYTES + 4 * num_lanes
        if len(payload) < states_end:
            raise CacheCorruptError(f"a coded chunk has {len(payload)} bytes, expected at least {states_end}")
        num_words, num_raw_bytes = (int(n) for n in payload[:_HEADER_BYTES].view("<u4"))
        words_end = states_end + 2 * num_words
        if words_end + num_raw_bytes > len(payload):
            raise CacheCorruptError(
                f"a coded chunk declares {num_words} words and {num_raw_bytes} raw bytes, more than its "
                f"{len(payload)} bytes hold"
            )
        self.models = models
        self.lanes = payload[_HEADER_BYTES:states_end].view("<u4").astype(np.uint32)
        self.words = payload[states_end:words_end].view("<u2").astype(np.uint32)
        self.next_word = 0
        raw = np.concatenate([payload[words_end : words_end + num_raw_bytes], np.zeros(8, np.uint8)])
        self._num_raw_bits = 8 * num_raw_bytes
        self._raw = words_at_bytes(raw)
        self._next_bit = 0

    def read(self, name: str, count: int, contexts: np.ndarray | int = 0) -> np.ndarray:
        """The next `count` values, int64, each in its context."""
        return _values_in_step([self], [Request(name, count, contexts)])[0]

    def values(self, tokens: np.ndarray, dtype: type[np.signedinteger]) -> np.ndarray:
        """Tokens with the raw bits that come next."""
        long = np.flatnonzero(tokens >= NUM_DIRECT)
        values = tokens.astype(dtype)
        if len(long):
            long_tokens = tokens[long]
            counts = raw_bit_counts(long_tokens)
            total = int(counts.sum())
            if self._next_bit + total > self._num_raw_bits:
                raise CacheCorruptError("a coded chunk ends before its last raw bits")
            values[long] = values_of(long_tokens, unpack_bits(self._raw, self._next_bit, counts))
            self._next_bit += total
        return values


def read_in_step(decoders: Sequence[Decoder], readings: Sequence[Reading[T]]) -> list[T]:
    """What several readings, which make the same calls of one set of models, return: each from its own decoder.

    Decoders of equally many lanes. A numpy call on a few thousand lanes costs little more than one on a thousand.
    """
    found: list[T] = []
    requests = [next(reading) for reading in readings]
    while requests:
        answers = _values_in_step(decoders, requests)
        requests = []
        for reading, values in zip(readings, answers, strict=True):
            try:
                requests.append(reading.send(values))
            except StopIteration as stop:
                found.append(stop.value)
    return found


def _values_in_step(decoders: Sequence[Decoder], requests: Sequence[Request]) -> list[np.ndarray]:
    """Rounds that all calls have in full are decoded together, the rest of each call by itself."""
    num_lanes = len(decoders[0].lanes)
    model = decoders[0].models[requests[0].name]
    together = min(request.count for request in requests) // num_lanes
    tokens = [np.empty(request.count, np.uint8) for request in requests]
    if together:
        states_PL = np.stack([decoder.lanes for decoder in decoders])
        offsets_RPL = np.empty((together, *states_PL.shape), np.uint32)
        for p, request in enumerate(requests):
            offsets_RPL[:, p] = _offsets(request, 0, together * num_lanes).reshape(-1, num_lanes)
        tokens_RPL = _tokens(model, states_PL, offsets_RPL, decoders)
        for p, decoder in enumerate(decoders):
            decoder.lanes[:] = states_PL[p]
            tokens[p][: together * num_lanes].reshape(-1, num_lanes)[...] = tokens_RPL[:, p]
    for decoder, request, own in zip(decoders, requests, tokens, strict=True):
        for first in range(together * num_lanes, request.count, num_lanes):
            last = min(first + num_lanes, request.count)
            states_1L = decoder.lanes[None, : last - first]
            own[first:last] = _tokens(model, states_1L, _offsets(request, first, last)[None, None], [decoder])[0, 0]
    return [
        decoder.values(own, request.dtype) for decoder, own, request in zip(decoders, tokens, requests, strict=True)
    ]


def _offsets(request: Request, first: int, last: int) -> np.ndarray:
    """Where the contexts of symbols `first` to `last` begin in the model's table of slots."""
    if isinstance(request.contexts, np.ndarray):
        return request.contexts[first:last].astype(np.uint32, copy=False) << np.uint32(PROBABILITY_BITS)
    return np.full(last - first, request.contexts << PROBABILITY_BITS, np.uint32)


def _tokens(model: Model, states_PL: np.ndarray, offsets_RPL: np.ndarray, decoders: Sequence[Decoder]) -> np.ndarray:
    """(R, P, L) uint8, of R rounds over the lanes of P decoders, whose states are moved on in place."""
    found_RPL = np.empty(offsets_RPL.shape, "<u4")
    flat = states_PL.reshape(-1)  # a view: the states are contiguous
    edges = np.arange(1, len(decoders)) * states_PL.shape[1]
    scratch_PL = np.empty_like(states_PL)
    nexts = [decoder.next_word for decoder in decoders]
    for offsets_PL, found_PL in zip(offsets_RPL, found_RPL, strict=True):
        np.bitwise_and(states_PL, _SLOT_MASK, out=scratch_PL)
        scratch_PL += offsets_PL
        found_PL[...] = model.slots.take(scratch_PL)
        states_PL >>= _SLOT_BITS
        np.right_shift(found_PL, _SLOT_BITS, out=scratch_PL)
        scratch_PL &= _SLOT_MASK
        states_PL *= scratch_PL
        states_PL += np.bitwise_and(found_PL, _SLOT_MASK, out=scratch_PL)
        low = (flat < _LOWEST_STATE).nonzero()[0]
        ends = [0, *low.searchsorted(edges).tolist(), len(low)]
        lasts = [first + ends[p + 1] - ends[p] for p, first in enumerate(nexts)]
        pieces = [decoders[p].words[first : lasts[p]] for p, first in enumerate(nexts)]
        words = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if len(words) < len(low):
            raise CacheCorruptError("a coded chunk ends before its last symbol")
        flat[low] = (flat[low] << _WORD_BITS) | words
        nexts = lasts
    for decoder, last in zip(decoders, nexts, strict=True):
        decoder.next_word = last
    tokens_RPL: np.ndarray = found_RPL.view(np.uint8).reshape(*found_RPL.shape, 4)[..., _TOKEN_BYTE]
    return tokens_RPL
