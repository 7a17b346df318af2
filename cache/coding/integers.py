"""Integers as a token and raw bits: small ones have a token of their own, large ones two per octave.

The split of JPEG XL's hybrid integers (ISO/IEC 18181-1, C.3.3) with split exponent 3, one bit of mantissa in the token.
An entropy coder sees the tokens; the raw bits are nearly uniform and are stored as they are.
"""

import numpy as np

NUM_DIRECT = 8
_DIRECT_EXPONENT = 3


def num_tokens(largest: int) -> int:
    """Tokens needed for the integers 0..largest."""
    return int(tokens_of(np.array([largest], np.int64))[0]) + 1


def tokens_of(values: np.ndarray) -> np.ndarray:
    """The token of each value >= 0, uint8: v below 8; then 8 + 2 (e - 3) + (next bit), with e = floor(log2 v)."""
    exponents = np.frexp(values.astype(np.float64))[1] - 1
    half = (values >> np.maximum(exponents - 1, 0)) & 1
    large = NUM_DIRECT + 2 * (exponents - _DIRECT_EXPONENT) + half
    tokens: np.ndarray = np.where(values < NUM_DIRECT, values, large).astype(np.uint8)
    return tokens


def raw_bit_counts(tokens: np.ndarray) -> np.ndarray:
    """Raw bits that follow each token, int64: e - 1, none for the direct ones."""
    counts: np.ndarray = _RAW_BITS[tokens]
    return counts


def values_of(tokens: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """The values of tokens with their raw bits, int64."""
    values: np.ndarray = _BASES[tokens] + raw
    return values


def zigzag(values: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, .. as 0, 1, 2, 3, .."""
    return np.where(values < 0, -2 * values - 1, 2 * values)


def unzigzag(values: np.ndarray) -> np.ndarray:
    """The inverse of zigzag."""
    found: np.ndarray = (values >> 1) ^ -(values & 1)
    return found


def columns(num_rows: int, num_columns: int) -> np.ndarray:
    """An array (rows, columns) int16 to be filled by columns, each of them contiguous.

    A few elements stand between columns: at a stride of a power of two all would fall into one set of the processor's
    cache, and turning them into rows would take eight times as long.
    """
    return np.empty((num_columns, num_rows + 32), np.int16)[:, :num_rows].T


def pack_bits(values: np.ndarray, counts: np.ndarray) -> bytes:
    """`counts[i]` low bits of each value, one after the other, least significant first; at most 32 bits each."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    starts = ends - counts
    first_byte, shift = starts >> 3, (starts & 7).astype(np.uint64)
    shifted = values.astype(np.uint64) << shift
    size = (total + 7) // 8 + 5
    packed = np.zeros(size)
    for byte in range(5):  # bits of different values never meet, so that adding is the same as or
        part = (shifted >> np.uint64(8 * byte)) & np.uint64(255)
        packed += np.bincount(first_byte + byte, weights=part, minlength=size)
    return packed.astype(np.uint8)[: (total + 7) // 8].tobytes()


def words_at_bytes(packed: np.ndarray) -> np.ndarray:
    """The 8 bytes from each place of `packed` uint8 on as one integer, int64; less by 7 than there are bytes."""
    eight = np.lib.stride_tricks.sliding_window_view(packed, 8)
    return np.ascontiguousarray(eight).view("<i8")[:, 0]


def unpack_bits(words: np.ndarray, first_bit: int, counts: np.ndarray) -> np.ndarray:
    """The inverse of pack_bits from a bit offset on, int64; `words` as words_at_bytes gives them."""
    starts = first_bit + np.cumsum(counts) - counts
    values: np.ndarray = (words[starts >> 3] >> (starts & 7)) & ((np.int64(1) << counts) - 1)
    return values


def _token_table() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.arange(256)
    exponents = np.minimum((tokens - NUM_DIRECT) // 2 + _DIRECT_EXPONENT, 33)
    direct = tokens < NUM_DIRECT
    half = (tokens - NUM_DIRECT) & 1
    raw_bits = np.where(direct, 0, exponents - 1).astype(np.int64)
    bases = np.where(direct, tokens, (2 + half) << np.maximum(exponents - 1, 0)).astype(np.int64)
    return raw_bits, bases


_RAW_BITS, _BASES = _token_table()
