"""What was written is what is read, in every way of reading."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import TOKENIZER_JSON, make_spec, window_arrays, write_cache, write_shards
from tristill.cache import Cache, CacheRequestError, CacheWriter, Need, PlainTopKProfile, open_cache
from tristill.cache.arrays import ids_dtype


def test_every_window_reads_back_as_written(small_cache: Cache) -> None:
    for split in ("train", "validation"):
        for index in range(small_cache.num_windows(split)):
            expected = window_arrays(small_cache.spec, split, range(index, index + 1))
            found = small_cache.window(split, index)
            np.testing.assert_array_equal(found.input_ids, expected["input_ids"])
            for name, array in found.target.items():
                np.testing.assert_array_equal(array, expected[name])
                assert array.dtype == expected[name].dtype
            for layer, array in found.hidden.items():
                np.testing.assert_array_equal(array, expected[f"hidden_{layer}"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    train=st.integers(1, 40),
    per_chunk=st.integers(1, 5),
    chunks_per_shard=st.integers(1, 4),
    batch=st.integers(1, 50),
    top_k=st.integers(1, 300),
    vocab_size=st.sampled_from([300, 65_536, 65_537]),
)
def test_any_shape_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    train: int,
    per_chunk: int,
    chunks_per_shard: int,
    batch: int,
    top_k: int,
    vocab_size: int,
) -> None:
    spec = make_spec(
        train,
        2,
        per_chunk=per_chunk,
        per_shard=per_chunk * chunks_per_shard,
        profile=PlainTopKProfile(top_k=top_k),
        vocab_size=vocab_size,
    )
    cache = write_cache(tmp_path_factory.mktemp("cache"), spec, batch=batch)
    assert cache.window("train", 0).input_ids.dtype == (np.uint16 if vocab_size <= 65_536 else np.uint32)
    (found,) = cache.stream("train", train, seed=None, hidden_layers=(1, 3))
    expected = window_arrays(spec, "train", range(train))
    np.testing.assert_array_equal(found.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(found.target["head_logits"], expected["head_logits"])
    np.testing.assert_array_equal(found.hidden[3], expected["hidden_3"])
    cache.close()


def test_bytes_do_not_depend_on_batches_or_interruptions(tmp_path: Path) -> None:
    spec = make_spec()
    write_cache(tmp_path / "whole", spec, batch=7)
    for stop_after in (1, 2, 3):
        write_shards(CacheWriter(tmp_path / "resumed", spec, TOKENIZER_JSON), batch=2, at_most=stop_after)
        (tmp_path / "resumed" / ".train-00001.h5.partial").write_bytes(b"left by a kill")
    write_cache(tmp_path / "resumed", spec, batch=5)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    resumed = {path.name: path.read_bytes() for path in (tmp_path / "resumed").iterdir()}
    resumed.pop(".train-00001.h5.partial", None)
    assert whole == resumed


def test_writer_keeps_what_is_verified_and_writes_a_damaged_shard_again(tmp_path: Path) -> None:
    spec = make_spec()
    write_cache(tmp_path, spec).close()
    before = (tmp_path / "train-00002.h5").read_bytes()
    (tmp_path / "train-00002.h5").write_bytes(before[:-9])
    writer = CacheWriter(tmp_path, spec, TOKENIZER_JSON)
    assert [shard.name for shard in writer.missing_shards()] == ["train-00002.h5"]
    write_shards(writer)
    writer.finish()
    assert (tmp_path / "train-00002.h5").read_bytes() == before


def test_only_what_is_asked_for_is_read(small_cache: Cache) -> None:
    (batch,) = small_cache.stream("validation", 5, seed=None, targets=False)
    assert not batch.target
    assert not batch.hidden


def test_writer_refuses_windows_that_do_not_fit(tmp_path: Path) -> None:
    spec = make_spec()
    writer = CacheWriter(tmp_path, spec, TOKENIZER_JSON)
    shard = writer.shard(writer.missing_shards()[0])
    good = window_arrays(spec, "train", range(4))
    with pytest.raises(CacheRequestError, match="found datasets"):
        shard.append({"input_ids": good["input_ids"]})
    with pytest.raises(CacheRequestError, match=r"head_ids: found shape \(4, 6, 4\), expected \(4, 6, 5\)"):
        shard.append({**good, "head_ids": good["head_ids"][..., :4]})
    with pytest.raises(CacheRequestError, match=r"found 0 windows, expected 16"):
        shard.commit()
    with pytest.raises(CacheRequestError, match="more than its 16 windows"):
        shard.append(window_arrays(spec, "train", range(17)))
    with pytest.raises(CacheRequestError, match=r"6 shards are not written yet: train-00000\.h5"):
        writer.finish()


def test_reader_refuses_what_is_not_there(small_cache: Cache) -> None:
    with pytest.raises(
        CacheRequestError, match=r"hidden states of layers \[2\] are asked for.*holds those of \[1, 3\]"
    ):
        next(small_cache.stream("train", 4, seed=0, hidden_layers=(2,)))
    with pytest.raises(CacheRequestError, match="window 70: the split train has 70 windows"):
        small_cache.window("train", 70)
    with pytest.raises(CacheRequestError, match="rank 2 is not below world_size 2"):
        next(small_cache.stream("train", 4, seed=0, rank=2, world_size=2))
    with pytest.raises(CacheRequestError, match="batch_size 5 is not a multiple of world_size 2"):
        next(small_cache.stream("train", 5, seed=0, world_size=2))


def test_a_profile_says_which_temperatures_it_serves() -> None:
    spec = make_spec()
    assert spec.unserved([Need("forward_kl", 2.0)], {"residual": (1,)}) == []
    assert spec.unserved([]) == []
    (reason,) = spec.unserved([Need("forward_kl", 1.0)])
    assert "temperature 1 is asked for, but this plain_topk cache is exact at 2 only" in reason
    assert make_spec(profile=PlainTopKProfile(top_k=300)).unserved([Need("forward_kl", 7.5)]) == []


def test_spec_refuses_what_cannot_be_stored() -> None:
    with pytest.raises(ValueError, match="must be a multiple of"):
        make_spec(per_chunk=3, per_shard=16)
    with pytest.raises(ValueError, match=r"windows_per_chunk\n.*less than or equal to 8192"):
        make_spec(per_chunk=2**17, per_shard=2**17)
    with pytest.raises(ValueError, match="expected at most 65536 chunks, which are 1572864 positions"):
        make_spec(per_shard=2**20)
    with pytest.raises(ValueError, match="less than or equal to 4294967296"):
        make_spec(vocab_size=2**32 + 1)
    with pytest.raises(CacheRequestError, match="ids are stored in at most 32 bits"):
        ids_dtype(2**32 + 1)
    with pytest.raises(ValueError, match="top_k is 301, but the vocabulary has only 300 entries"):
        make_spec(profile=PlainTopKProfile(top_k=301))


def test_stream_can_be_abandoned(small_cache: Cache) -> None:
    stream = small_cache.stream("train", 4, seed=0)
    next(stream)
    stream.close()
    assert open_cache(small_cache.folder).num_windows("train") == 70
