"""Room for shards in a local folder that is bounded, shared by the processes of one machine."""

import os
from collections.abc import Callable
from pathlib import Path

from tristill.cache.layout import SHARD_NAME
from tristill.cache.locks import lock

ROOM_LOCK = "room"
Order = Callable[[str], int | None]


def free_room(folder: Path, local_bytes: int, num_bytes: int, order: Order, own: str = "") -> bool:
    """Remove shards until there is room for so many bytes more; whether there is. ROOM_LOCK must be held.

    Of the shards that may go, those of the lowest `order` go first (None: never), of equals the least recently used. A
    shard that another process or thread is opening or fetching stays. What is fetched counts with its whole size from
    the start, but not under `own` name; what a killed process left of a fetch is removed.
    """
    used = 0
    shards = []
    for entry in os.scandir(folder):
        name = entry.name.removeprefix(".").removesuffix(".partial")
        if not SHARD_NAME.match(name):
            continue
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if entry.name != name:  # a fetch
            if name == own or _removed(folder, name, entry.name):
                continue
        elif (place := order(name)) is not None:
            shards.append((place, found.st_atime_ns, found.st_size, name))
        used += found.st_size
    for _, _, size, name in sorted(shards):
        if used + num_bytes <= local_bytes:
            break
        if _removed(folder, name, name):
            used -= size
    return used + num_bytes <= local_bytes


def _removed(folder: Path, shard: str, name: str) -> bool:
    with lock(folder, shard, wait=False) as is_held:
        if is_held:
            (folder / name).unlink(missing_ok=True)
        return is_held
