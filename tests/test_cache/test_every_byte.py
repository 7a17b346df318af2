"""Every byte of every file of a cache, damaged in turn: found, never read as data, never the end of the process."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import pytest
from tiny_caches import KINDS, write_tiny_cache

from conftest import ENVIRONMENT, ROOT

FILES = ("train-00000.h5", "cache.json", "tables.h5", "tokenizer.json")
SECONDS_PER_CASE = 2.0
MOST_GROWN_KIB = 64 * 2**10


def walked(folder: Path, orders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What came of each order, in one child; a child that dies or hangs is a failure that names the order."""
    try:
        done = subprocess.run(
            [sys.executable, "tests/damage_walk.py", str(folder)],
            input="\n".join(map(json.dumps, orders)),
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            timeout=60 + SECONDS_PER_CASE * len(orders),
        )
    except subprocess.TimeoutExpired as exc:
        num_done = len((exc.stdout or b"").splitlines())
        pytest.fail(f"hangs at {orders[min(num_done, len(orders) - 1)]}")
    results = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or len(results) != len(orders):
        pytest.fail(f"exit code {done.returncode} at {orders[len(results)]}: {done.stderr[-2000:]}")
    return results


def flips(folder: Path, name: str, sampled: int | None) -> list[dict[str, Any]]:
    """One bit, seeded, and all eight, of every byte; or of so many bytes."""
    generator = random.Random(name)
    content = (folder / name).read_bytes()
    places = range(len(content)) if sampled is None else sorted(generator.choices(range(len(content)), k=sampled))
    return [
        {"file": name, "at": at, "bytes": bytes([content[at] ^ pattern]).hex()}
        for at in places
        for pattern in (1 << generator.randrange(8), 255)
    ]


def cuts(folder: Path, name: str, sampled: int | None) -> list[dict[str, Any]]:
    """Truncations: at nothing, one byte, all but one, where a chunk begins or ends, where a block does, and a stride."""
    content = (folder / name).read_bytes()
    sizes = {0, 1, len(content) - 1, *range(0, len(content), 61)}
    if name.endswith(".h5"):
        with h5py.File(folder / name) as file:
            infos = [
                file[one].id.get_chunk_info(i)
                for one in file
                if file[one].chunks
                for i in range(file[one].id.get_num_chunks())
            ]
        sizes |= {end for info in infos for end in (info.byte_offset, info.byte_offset + info.size)}
        for signature in (b"OHDR", b"OCHK", b"FAHD", b"FADB"):
            at = content.find(signature)
            while at >= 0:
                sizes |= {at, at + 4}
                at = content.find(signature, at + 1)
    chosen = sorted(size for size in sizes if size < len(content))
    if sampled is not None:
        chosen = sorted({0, 1, len(content) - 1, *random.Random(name).sample(chosen, min(sampled, len(chosen)))})
    return [{"file": name, "size": size} for size in chosen]


@pytest.mark.parametrize(
    "sampled", [pytest.param(30, id="a sample"), pytest.param(None, id="all", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_anywhere_is_found_and_never_read_as_data(tmp_path: Path, kind: str, sampled: int | None) -> None:
    """A sample of bytes and truncations of each file here, each and every one when slow."""
    write_tiny_cache(tmp_path, kind)
    files = [name for name in FILES if (tmp_path / name).is_file()]
    orders = [order for name in files for order in (*flips(tmp_path, name, sampled), *cuts(tmp_path, name, sampled))]
    results = walked(tmp_path, orders)
    tally = Counter((one["file"], "cut" if "size" in one else "flip", one["found"], one["read"]) for one in results)
    sizes = {name: (tmp_path / name).stat().st_size for name in files}
    for key, count in sorted(tally.items()):
        print(kind, *key, count)
    print(kind, sizes, f"{len(results)} cases, grown {max(one['grown_kib'] for one in results)} KiB")
    assert not [one for one in results if one["read"] == "wrong"]
    assert not [one for one in results if not one["found"] and not (one["file"] == "cache.json" and one["same"])]
    assert max(one["grown_kib"] for one in results) < MOST_GROWN_KIB
