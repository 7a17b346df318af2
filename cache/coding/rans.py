"""Range asymmetric numeral systems over many lanes at once: each numpy call codes one symbol in every lane.

Duda 2013 (arXiv 1311.2540); interleaving as in Giesen 2014 (arXiv 1402.3392). A lane's state x is in [2^16, 2^32); it
is refilled by words of 16 bits. Lane i mod L codes symbol i of every call, so the number of lanes is free of the
shape of the data: a call codes its symbols in rounds of L.

Payload: `num_words` and `num_raw_bytes` as <u4, L states as <u4, the words as <u2, the raw bits.
"""

from collections.abc import Mapping

import numpy as np

from cache.coding.frequencies import PROBABILITY_BITS, TOTAL, Model
from cache.coding.integers import NUM_DIRECT, pack_bits, raw_bit_counts, tokens_of, unpack_bits, values_of
from cache.errors import CacheCorruptError

_LOWEST_STATE = 1 << 16
_WORD_BITS = np.uint32(16)
_SLOT_BITS = np.uint32(PROBABILITY_BITS)
_SLOT_MASK = np.uint32(TOTAL - 1)
_TOKEN_SHIFT = np.uint32(24)
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
        self._models = models
        self._num_lanes = num_lanes
        self._states = payload[_HEADER_BYTES:states_end].view("<u4").astype(np.uint32)
        self._words = payload[states_end:words_end].view("<u2").astype(np.uint32)
        self._next_word = 0
        self._raw = np.concatenate([payload[words_end : words_end + num_raw_bytes], np.zeros(8, np.uint8)])
        self._next_bit = 0

    def read(self, name: str, count: int, contexts: np.ndarray | int = 0) -> np.ndarray:
        """The next `count` values, int64, each in its context."""
        tokens = self._tokens(count, contexts, self._models[name])
        long = np.flatnonzero(tokens >= NUM_DIRECT)
        if not len(long):
            return tokens.astype(np.int64)
        counts = raw_bit_counts(tokens[long])
        total = int(counts.sum())
        if self._next_bit + total > 8 * (len(self._raw) - 8):
            raise CacheCorruptError("a coded chunk ends before its last raw bits")
        raw = np.zeros(count, np.int64)
        raw[long] = unpack_bits(self._raw, self._next_bit, counts)
        self._next_bit += total
        return values_of(tokens, raw)

    def _tokens(self, count: int, contexts: np.ndarray | int, model: Model) -> np.ndarray:
        tokens = np.empty(count, np.uint8)
        offsets = (np.asarray(contexts) << PROBABILITY_BITS).astype(np.uint32)
        for first in range(0, count, self._num_lanes):
            state = self._states[: min(self._num_lanes, count - first)]
            places = state & _SLOT_MASK
            places += offsets if offsets.ndim == 0 else offsets[first : first + len(state)]
            found = model.slots.take(places)
            tokens[first : first + len(state)] = found >> _TOKEN_SHIFT
            state >>= _SLOT_BITS
            state *= (found >> _SLOT_BITS) & _SLOT_MASK
            state += found & _SLOT_MASK
            low = state < _LOWEST_STATE
            lowest = state[low]
            words = self._words[self._next_word : self._next_word + len(lowest)]
            if len(words) < len(lowest):
                raise CacheCorruptError("a coded chunk ends before its last symbol")
            state[low] = (lowest << _WORD_BITS) | words
            self._next_word += len(lowest)
        return tokens
