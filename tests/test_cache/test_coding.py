"""The entropy coder gives back what it took, costs what its models say, and never reads past its bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tristill.cache.coding.frequencies import TOTAL, Model, frequencies_from_counts
from tristill.cache.coding.integers import (
    num_tokens,
    pack_bits,
    raw_bit_counts,
    tokens_of,
    unpack_bits,
    unzigzag,
    values_of,
    words_at_bytes,
    zigzag,
)
from tristill.cache.coding.rans import Decoder, Encoder
from tristill.cache.coding.streams import Histograms
from tristill.cache.errors import CacheCorruptError

LARGEST = 2**32 - 1


def model(largest: int, contexts: int = 1, seed: int = 0) -> Model:
    counts = np.random.default_rng(seed).geometric(0.05, (contexts, num_tokens(largest))) - 1
    return Model(frequencies_from_counts(counts))


@given(arrays.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, LARGEST)))
def test_every_integer_is_its_token_and_raw_bits(values: np.ndarray) -> None:
    tokens = tokens_of(values)
    counts = raw_bit_counts(tokens)
    raw = values & ((1 << counts) - 1)
    np.testing.assert_array_equal(values_of(tokens, raw), values)
    assert (tokens < num_tokens(LARGEST)).all()
    packed = np.frombuffer(pack_bits(raw, counts) + bytes(8), np.uint8)
    np.testing.assert_array_equal(unpack_bits(words_at_bytes(packed), 0, counts), raw)
    assert len(packed) - 8 == -(-int(counts.sum()) // 8)


def test_tokens_follow_the_order_of_values_and_lose_none() -> None:
    edges = sorted({0, 7, 8, 9, 11, 12, *(2**e + d for e in range(3, 32) for d in (-1, 0, 1))} - {2**32})
    tokens = tokens_of(np.array(edges, np.int64)).astype(int)
    assert (np.diff(tokens) >= 0).all()
    assert [num_tokens(v) for v in (1, 7, 8, 15, 2047)] == [2, 8, 9, 10, 24]


@given(arrays.arrays(np.int64, 20, elements=st.integers(-(2**30), 2**30)))
def test_zigzag_is_undone(values: np.ndarray) -> None:
    assert (zigzag(values) >= 0).all()
    np.testing.assert_array_equal(unzigzag(zigzag(values)), values)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 70), st.sampled_from([3, 300, LARGEST]), st.integers(1, 5))
def test_coded_calls_come_back_in_order_at_any_number_of_lanes(
    data: st.DataObject, num_lanes: int, largest: int, contexts: int
) -> None:
    models = {"a": model(largest, contexts), "b": model(1)}
    elements = st.one_of(st.integers(0, min(largest, 9)), st.integers(0, largest))
    calls = []
    for _ in range(data.draw(st.integers(0, 4))):
        values = data.draw(arrays.arrays(np.int64, st.integers(0, 200), elements=elements))
        calls.append(
            ("a", values, data.draw(arrays.arrays(np.int64, len(values), elements=st.integers(0, contexts - 1))))
        )
        calls.append(("b", values & 1, np.zeros(len(values), np.int64)))
    encoder = Encoder(models, num_lanes)
    for name, values, used in calls:
        encoder.write(name, values, used)
    payload = encoder.finish()
    decoder = Decoder(models, np.frombuffer(payload + bytes(5), np.uint8), num_lanes)
    for name, values, used in calls:
        np.testing.assert_array_equal(decoder.read(name, len(values), used), values)


def test_the_cost_is_that_of_the_model() -> None:
    generator = np.random.default_rng(0)
    values = np.minimum(generator.geometric(0.4, 200_000) - 1, 7)
    counted = Histograms({"x": (1, 8)})
    counted.write("x", values)
    models = {"x": Model(counted.frequencies()["x"])}
    encoder = Encoder(models, 64)
    encoder.write("x", values)
    shares = np.bincount(values, minlength=8) / len(values)
    entropy_bytes = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() * len(values) / 8
    payload_bytes = len(encoder.finish()) - 8
    assert entropy_bytes <= payload_bytes <= 1.003 * entropy_bytes + 4 * 64


@given(arrays.arrays(np.int64, (4, 30), elements=st.integers(0, 10**9)))
def test_frequencies_sum_up_and_leave_no_token_out(counts: np.ndarray) -> None:
    frequencies = frequencies_from_counts(counts)
    assert (frequencies.astype(int).sum(axis=1) == TOTAL).all()
    assert frequencies.min() >= 1
    assert frequencies.max() < TOTAL


@pytest.mark.parametrize(
    "frequencies", [[[TOTAL]], [[0, TOTAL]], [[1, TOTAL]], [[2048, 2048], [2048, 2047]], [[1] * 300]]
)
def test_frequencies_that_code_nothing_are_refused(frequencies: list[list[int]]) -> None:
    with pytest.raises(
        CacheCorruptError, match=r"a table of frequencies .* is damaged: expected rows of 2 to 256 numbers"
    ):
        Model(np.array(frequencies, np.uint16))


def test_a_payload_that_is_cut_or_lies_about_its_size_is_refused() -> None:
    models = {"x": model(300)}
    values = np.random.default_rng(1).integers(0, 300, 5000)
    encoder = Encoder(models, 16)
    encoder.write("x", values)
    payload = np.frombuffer(encoder.finish(), np.uint8)
    for size in (0, 7, 50, len(payload) - 1):
        with pytest.raises(CacheCorruptError, match=r"expected at least|more than its"):
            Decoder(models, payload[:size], 16)
    for field, message in ((0, "before its last symbol"), (4, "before its last raw bits")):
        lying = payload.copy()
        lying[field : field + 4] = np.array([9], "<u4").view(np.uint8)
        with pytest.raises(CacheCorruptError, match=message):
            Decoder(models, lying, 16).read("x", 5000)


def test_random_bytes_decode_to_something_or_are_refused() -> None:
    generator = np.random.default_rng(2)
    models = {"x": model(LARGEST)}
    for _ in range(200):
        payload = generator.integers(0, 256, 4000).astype(np.uint8)
        payload[:8] = np.array([900, 400], "<u4").view(np.uint8)
        try:
            values = Decoder(models, payload, 16).read("x", 1000)
        except CacheCorruptError as exc:
            assert "before its last" in str(exc)
        else:
            assert (values >= 0).all()
            assert (values < 2**34).all()
