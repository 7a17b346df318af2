"""The container is plain HDF5 that others read, and its bytes never change by accident."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np

from conftest import make_spec, window_arrays, write_cache
from tristill.cache import Cache, PlainTopKProfile, open_cache
from tristill.cache.hashing import sha256_of_file

GOLDEN = Path(__file__).parent / "golden"
OTHER_PROGRAM = """
import sys, h5py, hdf5plugin, numpy
with h5py.File(sys.argv[1]) as file:
    numpy.savez(sys.argv[2], **{name: dataset[...] for name, dataset in file.items()})
"""


def test_anybody_with_hdf5plugin_reads_the_same_data(small_cache: Cache, tmp_path: Path) -> None:
    copy = tmp_path / "read.npz"
    shard = small_cache.folder / "train-00001.h5"
    subprocess.run([sys.executable, "-c", OTHER_PROGRAM, str(shard), str(copy)], check=True)
    expected = window_arrays(small_cache.spec, "train", range(16, 32))
    with np.load(copy) as found:
        assert set(found) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_datasets_declare_the_registered_filter_and_little_endian_types(small_cache: Cache) -> None:
    with h5py.File(small_cache.folder / "train-00000.h5") as file:
        for array in small_cache.spec.arrays:
            dataset = file[array.name]
            assert dataset.id.get_create_plist().get_filter(0)[0] == 32015
            assert dataset.dtype == np.dtype(array.dtype)
            assert dataset.dtype.byteorder in "<=|"


def test_the_same_content_has_the_same_bytes_as_ever(tmp_path: Path) -> None:
    write_cache(tmp_path, make_spec(9, 2)).close()
    for path in sorted((GOLDEN / "version-2-plain").iterdir()):
        assert sha256_of_file(tmp_path / path.name) == sha256_of_file(path), path.name


def test_version_1_is_read_as_it_was_written() -> None:
    cache = open_cache(GOLDEN / "version-1")
    assert cache.spec.format_version == 1
    assert cache.spec.profile == PlainTopKProfile(top_k=5, temperature=2.0)
    assert cache.verify() == []
    (batch,) = cache.stream("train", 9, seed=None, hidden_layers=(1, 3))
    expected = window_arrays(cache.spec, "train", range(9))
    np.testing.assert_array_equal(batch.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(batch.target["head_logits"], expected["head_logits"])
    np.testing.assert_array_equal(batch.target["tail_logsumexp"], expected["tail_logsumexp"])
    np.testing.assert_array_equal(batch.hidden[3], expected["hidden_3"])
    assert batch.signals == {}
