"""The part of HDF5 that caches are written in, read without the library (docs/format.md, section 3).

The library is written in C and trusts what it reads: files with crafted metadata crash it or have it loop for ever,
and with it the process. Here every size is checked against the file before anything is read, every block's checksum
before it is taken apart, and whatever this format does not use is refused. Numbers of sections are those of the
"HDF5 File Format Specification", version 4.0.
"""

from tristill.cache.hdf5.blocks import Hdf5Error
from tristill.cache.hdf5.datasets import StoredChunk, StoredDataset
from tristill.cache.hdf5.file import Hdf5File

__all__ = ["Hdf5Error", "Hdf5File", "StoredChunk", "StoredDataset"]
