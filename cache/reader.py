"""Reads a finished cache: single windows, and shuffled batches in bounded memory."""

import stat
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from tristill.cache.errors import CacheCorruptError, CacheMismatchError, CacheMissingError, CacheRequestError
from tristill.cache.layout import TOKENIZER_NAME, ShardRange
from tristill.cache.manifest import Manifest, load_manifest
from tristill.cache.order import BLOCKS_PER_GROUP, Deal, Pacing, WindowOrder
from tristill.cache.parts import MASK_NAME, SIGNAL_STEP_NATS, Part, part_coders
from tristill.cache.profiles.profile import Place
from tristill.cache.regular_file import IrregularFileError, sha256_of_regular_file
from tristill.cache.remote import copied_from, remote_copy
from tristill.cache.shard import OpenShard, corrupt
from tristill.cache.shard_files import LocalShardFiles, ShardFiles
from tristill.cache.spec import CacheSpec, SplitName
from tristill.cache.tables import load_tables
from tristill.cache.verify import copied_file_problem, verify_cache

_MAX_OPEN_SHARDS = 64
_MAX_GROUPS_AHEAD = 64
_BLOCKS_IN_STEP = 8
_DAMAGE = (CacheCorruptError, ValueError, IndexError)
Arrays = dict[str, np.ndarray]
_SIGNAL_SIGNS = {"teacher_entropy": SIGNAL_STEP_NATS, "label_log_prob": -SIGNAL_STEP_NATS}


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """Windows in the order asked for; B windows, T positions.

    input_ids: (B, T + 1), unsigned. target: the profile's arrays by name, each (B, T, ...); empty if not asked for.
    signals: `teacher_entropy` and `label_log_prob`, (B, T) float32 in nats at the temperature of the dump, to 1/16 nat;
    empty if targets were not asked for or the cache is of version 1. hidden: per layer what its coding stores, of the
    T' kept positions of a window, (B, T', ..). hidden_scale: per layer (B, T') float16; empty unless in 8 bits. mask:
    (B, T) bool, the positions that count, all else being zero at the others; None if all count.
    """

    input_ids: np.ndarray
    target: dict[str, np.ndarray]
    signals: dict[str, np.ndarray]
    hidden: dict[int, np.ndarray]
    hidden_scale: dict[int, np.ndarray]
    mask: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class _StoredBlock:
    """A chunk of every dataset that is asked for, decompressed, and which windows these are."""

    shard: OpenShard
    chunk: int
    place: Place
    arrays: Arrays


@dataclass(frozen=True, slots=True)
class _Coming:
    """Batches (M, share) that a rank will give next, and the blocks that hold them, as far as they were asked for."""

    windows_MB: np.ndarray
    block_numbers: list[int]
    blocks: dict[int, Future[dict[int, Arrays]]] = field(default_factory=dict)


def open_cache(folder: Path | str) -> "Cache":
    """The finished cache in `folder`; checks the manifest, every shard's presence and size, and the tokenizer.

    Of a copy of a cache at a URL, shards are fetched and checked when they are needed.
    """
    return Cache(Path(folder))


class Cache:
    """A finished cache. Safe to read from several threads; open it again after a fork."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = load_manifest(folder)
        copy = remote_copy(folder)
        self._files: ShardFiles = copy.shard_files(self.manifest) if copy else LocalShardFiles(folder)
        self._ranges = self.manifest.ranges
        self._first_range = {shard.split: i for i, shard in reversed(list(enumerate(self._ranges)))}
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        for record in () if copy else self.manifest.shards:
            path = folder / record.name
            try:
                found = path.lstat()
            except FileNotFoundError:
                found = None
            if found is not None and stat.S_ISLNK(found.st_mode):
                raise corrupt(str(path), "is a link, not a regular file")
            found_bytes = found.st_size if found else None
            if found_bytes != record.file_bytes:
                if found_bytes is None and (url := copied_from(folder)):
                    raise CacheMissingError(
                        f"{path}: is not here, as this folder is a local copy of {url}; set cache.url to that, or give "
                        "it in place of the folder"
                    )
                what = "is missing" if found_bytes is None else f"found {found_bytes} bytes"
                raise corrupt(str(path), f"{what}, expected {record.file_bytes} bytes")
        try:
            sha256 = sha256_of_regular_file(self.tokenizer_path)
        except FileNotFoundError as exc:
            raise CacheCorruptError(f"{self.tokenizer_path}: is missing; run `tristill cache repair`") from exc
        except IrregularFileError as exc:
            raise CacheCorruptError(f"{self.tokenizer_path}: {exc}; run `tristill cache repair`") from exc
        if sha256 != self.spec.tokenizer_fingerprint:
            raise CacheMismatchError(
                f"{self.tokenizer_path}: found a tokenizer with fingerprint {sha256}, expected "
                f"{self.spec.tokenizer_fingerprint}, which made this cache; run `tristill cache repair`"
            )
        for name, sha256 in self.manifest.companions.items():
            if problem := copied_file_problem(folder / name, sha256):
                raise CacheCorruptError(f"{folder / name}: {problem}; run `tristill cache repair`")
        self.tables = load_tables(folder, self.spec)
        self._coders = part_coders(self.spec, self.tables)
        self._target_names = [array.name for array in self.spec.target_part.arrays]

    @property
    def spec(self) -> CacheSpec:
        """The settings, fingerprints and sizes of the cache."""
        return self.manifest.spec

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer that made the ids."""
        return self.folder / TOKENIZER_NAME

    def num_windows(self, split: SplitName) -> int:
        """Windows in a split; refuses a split that is not there."""
        if split not in self.spec.splits:
            raise CacheRequestError(f"{self.folder}: has no split {split}, found {sorted(self.spec.splits)}")
        return self.spec.splits[split].num_windows

    def verify(self, on_shard: Callable[[int], object] = lambda _: None) -> list[str]:
        """One line per damaged file; see verify_cache."""
        return verify_cache(self.folder, on_shard)

    def close(self) -> None:
        """Close all shards; they are opened again when needed."""
        self._files.close()
        with self._lock:
            for shard in self._open.values():
                shard.close()
            self._open.clear()

    def window(self, split: SplitName, index: int) -> WindowBatch:
        """One window with everything known of it, as a batch of one."""
        if not 0 <= index < self.num_windows(split):
            raise CacheRequestError(f"window {index}: the split {split} has {self.num_windows(split)} windows")
        layers = self.spec.hidden.layers if self.spec.hidden else ()
        block, row = divmod(index, self.spec.windows_per_chunk)
        found = {block: self._read_block(split, block, self.spec.parts)}
        return self._gather(found, np.array([block]), np.array([row]), targets=True, hidden_layers=layers)

    def chunk(self, split: SplitName, index: int) -> WindowBatch:
        """The windows of one chunk, in stored order, with everything but hidden states."""
        first = index * self.spec.windows_per_chunk
        if not 0 <= first < self.num_windows(split):
            raise CacheRequestError(f"chunk {index}: the split {split} has {self.num_windows(split)} windows")
        parts = tuple(part for part in self.spec.parts if part.name in {"windows", "signals", "target"})
        found = {index: self._read_block(split, index, parts)}
        rows = np.arange(min(self.spec.windows_per_chunk, self.num_windows(split) - first))
        return self._gather(found, np.full(len(rows), index), rows, targets=True, hidden_layers=())

    def mean_signals(self, split: SplitName, threads: int = 2) -> dict[str, np.ndarray]:
        """`teacher_entropy` and `label_log_prob` as means over each window of a split, in nats, (num_windows,).

        Over its positions that count; 0 in a window without any. Reads nothing else. Refuses caches of version 1, which
        have neither.
        """
        if self.spec.format_version == 1:
            raise CacheRequestError(f"{self.folder}: caches of format version 1 hold no entropies; dump it again")
        num_windows = self.num_windows(split)
        num_blocks = -(-num_windows // self.spec.windows_per_chunk)
        with ThreadPoolExecutor(threads, thread_name_prefix="cache-decode") as pool:
            blocks = list(pool.map(lambda b: self._read_block(split, b, (self.spec.signal_part,)), range(num_blocks)))
        share_W = np.ones(num_windows)
        if self.spec.is_masked:
            share_W = np.concatenate([block[MASK_NAME] for block in blocks])[:num_windows].mean(axis=1)
            share_W[share_W == 0] = 1.0
        return {
            name: np.concatenate([block[name] for block in blocks])[:num_windows].mean(axis=1)
            / share_W
            * np.float32(sign)
            for name, sign in _SIGNAL_SIGNS.items()
        }

    def stream(
        self,
        split: SplitName,
        batch_size: int,
        *,
        seed: int | None,
        epoch: int = 0,
        first_batch: int = 0,
        pacing: Pacing | None = None,
        rank: int = 0,
        world_size: int = 1,
        windows_per_shard: int | None = None,
        drop_last: bool = True,
        targets: bool = True,
        hidden_layers: tuple[int, ...] = (),
        threads: int = 2,
    ) -> Iterator[WindowBatch]:
        """Batches of one epoch, shuffled by (seed, epoch); `seed=None` gives the stored order.

        `batch_size` counts windows over all ranks; each of the `world_size` ranks gets its equal share of every batch
        (see Deal), so the batches are the same at any world size. `first_batch` resumes in mid-epoch. With a pacing,
        windows that are not yet seen are left out. `windows_per_shard`: in the order of another cache over the same
        windows, of shards of that size. With `drop_last=False` the last batch may be short. Only what is asked for is
        read and decompressed, in `threads` threads, one shuffle buffer ahead: memory is at most three buffers of
        decoded windows (64 chunks each, some 524,000 positions), whatever the size of the cache.
        """
        if not 0 <= rank < world_size:
            raise CacheRequestError(f"rank {rank} is not below world_size {world_size}")
        if batch_size % world_size:
            raise CacheRequestError(f"batch_size {batch_size} is not a multiple of world_size {world_size}")
        parts = tuple(
            part
            for part in self.spec.parts
            if part.name == "windows" or (targets and part.name in {"signals", "target"})
        ) + self.spec.hidden_parts(hidden_layers)
        order = WindowOrder(
            self.num_windows(split),
            self.spec.windows_per_chunk,
            windows_per_shard or self.spec.windows_per_shard,
            seed,
            epoch,
            pacing,
        )
        batches = order.batches(Deal(batch_size, rank, world_size), first_batch, drop_last=drop_last)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="cache-decode")
        try:
            for coming in self._prefetched(pool, batches, split, parts):
                for windows in coming.windows_MB:
                    blocks, rows = np.divmod(windows, self.spec.windows_per_chunk)
                    found = {block: coming.blocks[block].result()[block] for block in np.unique(blocks).tolist()}
                    if len(windows):
                        yield self._gather(found, blocks, rows, targets, hidden_layers)
        finally:
            pool.shutdown(cancel_futures=True)

    def _prefetched(
        self, pool: ThreadPoolExecutor, batches: Iterator[np.ndarray], split: SplitName, parts: tuple[Part, ...]
    ) -> Iterator[_Coming]:
        """Batches with their blocks on the way: a shuffle buffer ahead, or more if little of each is wanted here."""
        spec = self.spec
        chunks_per_shard = spec.windows_per_shard // spec.windows_per_chunk
        first = self._first_range[split]
        groups_ahead = min(2 * chunks_per_shard, _MAX_GROUPS_AHEAD)  # those of two runs, one for each chunk of a shard
        announced: deque[_Coming] = deque()
        asked: deque[_Coming] = deque()
        given: _Coming | None = None
        while True:
            for windows_MB in islice(batches, groups_ahead - len(announced)):
                announced.append(_Coming(windows_MB, _in_order(windows_MB.ravel() // spec.windows_per_chunk)))
            shards = (block // chunks_per_shard for coming in (*asked, *announced) for block in coming.block_numbers)
            self._files.ahead([self._ranges[first + shard].name for shard in dict.fromkeys(shards)])
            while announced and sum(len(coming.blocks) for coming in list(asked)[1:]) < BLOCKS_PER_GROUP:
                before = asked[-1] if asked else given
                coming = announced.popleft()
                if before:  # the last batch of a group may want blocks of the one before
                    coming.blocks.update((b, before.blocks[b]) for b in coming.block_numbers if b in before.blocks)
                new = [block for block in coming.block_numbers if block not in coming.blocks]
                for start in range(0, len(new), _BLOCKS_IN_STEP):
                    some = new[start : start + _BLOCKS_IN_STEP]
                    coming.blocks.update(dict.fromkeys(some, pool.submit(self._read_blocks, split, some, parts)))
                asked.append(coming)
            if not asked:
                return
            given = asked.popleft()
            yield given

    def _read_block(self, split: SplitName, block: int, parts: tuple[Part, ...]) -> Arrays:
        return self._read_blocks(split, [block], parts)[block]

    def _read_blocks(self, split: SplitName, blocks: list[int], parts: tuple[Part, ...]) -> dict[int, Arrays]:
        stored = [self._stored_block(split, block, parts) for block in blocks]
        for part in parts:
            if part.is_coded:
                coder, payloads = self._coders[part.name], [block.arrays.pop(part.name)[0] for block in stored]
                try:
                    decoded = coder.decode_together(payloads, [block.place for block in stored])
                except _DAMAGE:
                    decoded = [self._decoded(part, *pair) for pair in zip(payloads, stored, strict=True)]
                for block, arrays in zip(stored, decoded, strict=True):
                    block.arrays.update(arrays)
        return {number: block.arrays for number, block in zip(blocks, stored, strict=True)}

    def _decoded(self, part: Part, payload: np.ndarray, block: _StoredBlock) -> Arrays:
        """One block by itself, for an error that names it."""
        try:
            return self._coders[part.name].decode(payload, block.place)
        except _DAMAGE as exc:
            raise corrupt(f"{block.shard.path}: dataset {part.name}, chunk {block.chunk}", str(exc)) from exc

    def _stored_block(self, split: SplitName, block: int, parts: tuple[Part, ...]) -> _StoredBlock:
        """Of coded parts the payloads, under their names."""
        spec = self.spec
        held, chunk = self._held_in(split, block), block % (spec.windows_per_shard // spec.windows_per_chunk)
        shard = self._shard(held)
        first = chunk * spec.windows_per_chunk
        num_windows = min(spec.windows_per_chunk, held.num_windows - first)
        arrays: Arrays = {}
        counts = None
        if spec.is_masked:
            arrays[MASK_NAME] = shard.read_chunk(MASK_NAME, chunk) != 0
            counts = arrays[MASK_NAME][:num_windows]
        for part in parts:
            if part.name != MASK_NAME:
                names = [part.name] if part.is_coded else [array.name for array in part.arrays]
                arrays |= {name: shard.read_chunk(name, chunk) for name in names}
        place = Place(split, held.first_window + first, num_windows, spec.context_length, counts)
        return _StoredBlock(shard, chunk, place, arrays)

    def _held_in(self, split: SplitName, block: int) -> ShardRange:
        """The shard that a block of a split lies in."""
        shard_index = block // (self.spec.windows_per_shard // self.spec.windows_per_chunk)
        return self._ranges[self._first_range[split] + shard_index]

    def _shard(self, shard: ShardRange) -> OpenShard:
        with self._lock:
            if found := self._open.get(shard.name):
                self._open.move_to_end(shard.name)
                return found
        with self._files.held(shard.name) as path:  # may take long, while other threads read shards that are open
            opened = OpenShard(path, self.spec, shard)
        with self._lock:
            found = self._open.setdefault(shard.name, opened)
            self._open.move_to_end(shard.name)
            # A shard falls out of the table while a thread may still read it: its descriptor closes with the object.
            for name in [name for name, one in self._open.items() if one.is_removed]:
                del self._open[name]  # else the disk would keep what was evicted
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return found

    def _gather(
        self,
        found: Mapping[int, Mapping[str, np.ndarray]],
        blocks: np.ndarray,
        rows: np.ndarray,
        targets: bool,
        hidden_layers: tuple[int, ...],
    ) -> WindowBatch:
        """The windows at `rows` (B,) of `blocks` (B,)."""
        sources = [(found[block], row) for block, row in zip(blocks.tolist(), rows.tolist(), strict=True)]

        def stack(name: str) -> np.ndarray:
            first = sources[0][0][name]
            stacked = np.empty((len(sources), *first.shape[1:]), first.dtype)
            for place, (arrays, row) in enumerate(sources):
                stacked[place] = arrays[name][row]
            return stacked

        signs = _SIGNAL_SIGNS if targets and self.spec.format_version > 1 else {}
        scaled_layers = hidden_layers if self.spec.hidden and self.spec.hidden.has_scales else ()
        return WindowBatch(
            input_ids=stack("input_ids"),
            target={name: stack(name) for name in self._target_names} if targets else {},
            signals={name: stack(name) * np.float32(sign) for name, sign in signs.items()},
            hidden={layer: stack(f"hidden_{layer}") for layer in hidden_layers},
            hidden_scale={layer: stack(f"hidden_{layer}_scale") for layer in scaled_layers},
            mask=stack(MASK_NAME) if self.spec.is_masked else None,
        )


def _in_order(values: np.ndarray) -> list[int]:
    """Distinct values in the order in which they first come."""
    return list(dict.fromkeys(values.tolist()))
