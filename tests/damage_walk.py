"""Damages one file of a tiny cache in many ways, one after the other, and says what verify and the reader made of it.

A process of its own, since a crash would end it: `python tests/damage_walk.py FOLDER < orders`. An order is a line of
JSON, {"file", "at", "bytes"} to overwrite (hex) or {"file", "size"} to cut; each is answered by a line, flushed. The
process may take `EXTRA_BYTES` of address space more than it has when the intact cache has been read.
"""

import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

from tristill.cache import CacheError, open_cache
from tristill.cache.manifest import load_manifest
from tristill.cache.verify import verify_cache

EXTRA_BYTES = 2**28
_CASES_BETWEEN_COLLECTIONS = 20


def everything(folder: Path) -> list[bytes]:
    """All that a reader gives of the cache, and what it says of itself."""
    cache = open_cache(folder)
    try:
        layers = cache.spec.hidden.layers if cache.spec.hidden else ()
        return [
            (b"" if array is None else array.tobytes())
            for batch in cache.stream("train", 2, seed=None, drop_last=False, hidden_layers=layers, threads=1)
            for array in (
                batch.input_ids,
                batch.mask,
                *batch.target.values(),
                *batch.signals.values(),
                *batch.hidden.values(),
            )
        ]
    finally:
        cache.close()


def outcome_of(folder: Path, truth: list[bytes], manifest: object) -> dict[str, Any]:
    """found: whether verify sees it; same: whether the manifest still means the same; read: right, wrong or refused."""
    try:
        found = bool(verify_cache(folder, lambda _: None, workers=1))
        same = load_manifest(folder) == manifest
    except CacheError:
        found, same = True, False
    try:
        read = "right" if everything(folder) == truth else "wrong"
    except CacheError:
        read = "refused"
    return {"found": found, "same": same, "read": read}


def main() -> None:
    folder = Path(sys.argv[1])
    truth, manifest = everything(folder), load_manifest(folder)
    verify_cache(folder, lambda _: None, workers=1)
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + EXTRA_BYTES, held + EXTRA_BYTES))
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, line in enumerate(sys.stdin):
        if number % _CASES_BETWEEN_COLLECTIONS == 0:
            gc.collect()  # errors that are kept with their tracebacks are cycles: what they hold is not one case's
        order = json.loads(line)
        path = folder / order["file"]
        good = path.read_bytes()
        new = bytes.fromhex(order["bytes"]) if "bytes" in order else b""
        changed = (
            good[: order["size"]] if "size" in order else good[: order["at"]] + new + good[order["at"] + len(new) :]
        )
        path.write_bytes(changed)
        result = outcome_of(folder, truth, manifest)
        path.write_bytes(good)
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib
        print(json.dumps(order | result | {"grown_kib": grown_kib}), flush=True)


if __name__ == "__main__":
    main()
