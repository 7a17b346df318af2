"""What a process uses of its machine."""

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let the allocator of C keep what is freed, up to 1 GiB, instead of giving it back to the system.

    A training step allocates and frees the same tensors again and again; fresh pages of the system cost more than the
    arithmetic on them. Blocks of 32 MiB and more are given back as before. Does nothing where C is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def peak_rss_mib() -> float:
    """The largest resident set of this process so far, in MiB.

    On Linux as /proc says it: what getrusage says of a child begins with the peak of the process that started it.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
