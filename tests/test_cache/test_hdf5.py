"""Our reader of HDF5 finds what the library finds, and refuses all else without a crash."""

import time
from pathlib import Path

import h5py
import pytest
from hdf5_checksums import forged, metadata_blocks
from tiny_caches import KINDS, write_tiny_cache

from conftest import ROOT, make_spec, write_cache
from tristill.cache import CacheError, HiddenSpec
from tristill.cache.hdf5 import Hdf5Error, Hdf5File
from tristill.cache.hdf5.blocks import checksum
from tristill.cache.layout import shard_ranges
from tristill.cache.shard import OpenShard

GOLDEN = sorted((ROOT / "tests" / "test_cache" / "golden").glob("*/*.h5"))


def compare(path: Path) -> None:
    """Attributes, datasets, types, shapes, filters and the place of every chunk are those that h5py says."""
    found = Hdf5File.of(path.read_bytes())
    with h5py.File(path) as file:
        assert all(found.text(name) == bytes(value) for name, value in file.attrs.items())
        for name, dataset in file.items():
            ours = found.dataset(name)
            assert ours is not None
            assert (ours.dtype, ours.shape, ours.chunks) == (dataset.dtype.str, dataset.shape, dataset.chunks)
            if ours.chunks is None:
                assert ours.whole(2**20) == dataset[...].tobytes()
                continue
            properties = dataset.id.get_create_plist()
            assert ours.filters == tuple(properties.get_filter(i)[0] for i in range(properties.get_nfilters()))
            infos = [dataset.id.get_chunk_info(i) for i in range(dataset.id.get_num_chunks())]
            table = ours.chunk_table(len(infos))
            assert [(one.offset, one.num_bytes) for one in table] == [(info.byte_offset, info.size) for info in infos]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_of_all_versions_are_read_as_the_library_reads_them(path: Path) -> None:
    compare(path)


@pytest.mark.parametrize(
    ("layers", "windows"), [(1, 1100), (6, 5), (60, 2), (130, 2)], ids=["pages of chunks", "heap", "rows", "many"]
)
def test_many_chunks_and_many_datasets_are_found(tmp_path: Path, layers: int, windows: int) -> None:
    hidden = HiddenSpec(layers=tuple(range(layers)), width=2)
    spec = make_spec(windows, 1, per_chunk=1, per_shard=windows, context_length=2, hidden=hidden)
    write_cache(tmp_path, spec, batch=windows).close()
    compare(tmp_path / "train-00000.h5")


def test_the_checksum_is_that_of_the_published_vectors() -> None:
    assert checksum(b"") == 0xDEADBEEF
    assert checksum(b"Four score and seven years ago") == 0x17770551


@pytest.mark.parametrize("num_cases", [400, pytest.param(40_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_forged_metadata_is_refused_or_reads_within_the_file(tmp_path: Path, kind: str, num_cases: int) -> None:
    """Changed metadata whose checksums fit; the library crashed, or looped for ever, at 1 of 8,000 such files."""
    spec = write_tiny_cache(tmp_path, kind)
    (shard,) = shard_ranges(spec)
    path = tmp_path / shard.name
    image = path.read_bytes()
    blocks = metadata_blocks(image)
    assert sum(size for _, size in blocks) > 1000
    num_refused, slowest_s = 0, 0.0
    for seed in range(num_cases):
        path.write_bytes(forged(image, blocks, seed))
        start = time.process_time()
        try:
            opened = OpenShard(path, spec, shard)
            opened.verified_sha256()
            opened.close()
        except CacheError:
            num_refused += 1
        slowest_s = max(slowest_s, time.process_time() - start)
    print(f"{kind}: {num_refused} of {num_cases} refused, the slowest took {slowest_s:.3f} s")
    assert num_refused > num_cases / 2
    assert slowest_s < 5


@pytest.mark.parametrize("num_cases", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_forged_tables_are_refused_or_read_within_the_file(tmp_path: Path, num_cases: int) -> None:
    spec = write_tiny_cache(tmp_path, "coded")
    image = (tmp_path / "tables.h5").read_bytes()
    blocks = metadata_blocks(image)
    num_refused = 0
    for seed in range(num_cases):
        content = forged(image, blocks, seed)
        try:
            file = Hdf5File.of(content)
            for table in spec.tables:
                dataset = file.dataset(table.name)
                for chunk in dataset.chunk_table(1) if dataset else ():
                    assert chunk.offset + chunk.num_bytes <= len(content)
        except Hdf5Error:
            num_refused += 1
    print(f"tables: {num_refused} of {num_cases} refused")
    assert num_refused > num_cases / 10


def test_a_header_that_continues_in_itself_and_a_huge_block_are_refused(tmp_path: Path) -> None:
    spec = write_tiny_cache(tmp_path, "hidden")
    image = (tmp_path / "train-00000.h5").read_bytes()
    start, size = next((at, n) for at, n in metadata_blocks(image) if image[at : at + 4] == b"OCHK")
    block = b"OCHK" + b"\x10" + (16).to_bytes(2, "little") + b"\0" + start.to_bytes(8, "little")
    block += (size + 4).to_bytes(8, "little")
    block = block.ljust(size, b"\0")
    looped = image[:start] + block + checksum(block).to_bytes(4, "little") + image[start + size + 4 :]
    with pytest.raises(Hdf5Error, match="header is longer than 262144 bytes"):
        [Hdf5File.of(looped).dataset(dataset.name) for dataset in spec.datasets]
    superblock = image[:36] + b"\xff" * 7 + b"\x7f"
    with pytest.raises(Hdf5Error, match="are not inside of the file's"):
        Hdf5File.of(superblock + checksum(superblock).to_bytes(4, "little") + image[48:])
