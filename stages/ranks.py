"""The processes that work on one step together: started by torchrun, or one alone.

What ranks tell each other goes as JSON through tensors, so nothing is unpickled here either.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from tristill.stages.errors import LostRankError, OtherRankError, RanksError
from tristill.stages.interrupt import ending_signals

_Item = TypeVar("_Item")
LOST = "another rank has ended; run the same command again to go on"
_PATIENCE = timedelta(hours=24)
"""How long a rank waits for the others: a step of the first one alone may take long; torchrun ends all if one dies."""
_TIME_TO_MEET = timedelta(minutes=5)
_SAID_AFTER_S = 10
_MOST_RANKS = 2**20


@dataclass(frozen=True)
class Ranks:
    """This process among those that work on a step. local_rank counts those of this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that speaks to the user and keeps the records."""
        return self.rank == 0

    @property
    def are_many(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

    def gathered(self, value: Any) -> list[Any]:
        """What every rank gave here, in the order of ranks; anything that JSON holds. All ranks must call it."""
        if not self.are_many:
            return [value]
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(json.dumps(value).encode("ascii")), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        try:
            dist.all_gather(sizes, torch.tensor([len(own)]))
            padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
            padded[: len(own)] = own
            found = [torch.zeros_like(padded) for _ in range(self.world_size)]
            dist.all_gather(found, padded)
        except RuntimeError as exc:
            if is_loss_of_ranks(exc):
                raise LostRankError(LOST) from exc
            raise
        pairs = zip(found, sizes, strict=True)
        return [json.loads(bytes(content[: int(size)].numpy())) for content, size in pairs]

    def from_first(self, value: Any = None) -> Any:
        """What the first rank gave here, on every rank; anything that JSON holds. All ranks must call it."""
        return self.gathered(value if self.is_first else None)[0]

    def wait_for_all(self) -> None:
        """Return once every rank is here."""
        self.gathered(None)

    def share_of(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Those that are this rank's: dealt like cards, so that each has some of every part, or none is left for it."""
        return items[self.rank :: self.world_size]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """All ranks get past this block, or none does. All ranks must enter it.

        Where it fails, the lowest rank that failed raises its own error, which says what is wrong; all others raise
        OtherRankError, so that one thing that is wrong everywhere is told once.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as exc:
            if not self.are_many or isinstance(exc, LostRankError):
                raise
            failure = exc
        codes = self.gathered(None if failure is None else exit_code_of(failure))
        first = next((rank for rank, code in enumerate(codes) if code is not None), None)
        if first == self.rank and failure is not None:
            raise failure
        if first is not None:
            raise OtherRankError(f"rank {first} has failed, and says why", codes[first]) from failure


ALONE = Ranks()


def announced_ranks() -> Ranks:
    """This process among those that torchrun says it started, whether they have joined yet or not.

    Raises RanksError for variables that announce no such thing.
    """
    world_size = _announced("WORLD_SIZE", 1, 1, _MOST_RANKS)
    if world_size == 1:
        return ALONE
    return Ranks(_announced("RANK", 0, 0, world_size - 1), world_size, _announced("LOCAL_RANK", 0, 0, world_size - 1))


def _announced(name: str, absent: int, least: int, most: int) -> int:
    text = os.environ.get(name, "")
    try:
        value = int(text) if text else absent
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise RanksError(
            f"{name}: found {text!r} in the environment, expected {least} to {most}, as torchrun sets it; "
            "unset WORLD_SIZE to work with one process"
        )
    return value


def exit_code_of(error: Exception) -> int:
    """What a process that ends of it says to its parent."""
    return int(getattr(error, "exit_code", 1))


def is_loss_of_ranks(error: Exception) -> bool:
    """Whether torch.distributed says with it that another rank is gone: gloo does so in words alone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def current_ranks() -> Ranks:
    """This process among those of the group that `joined_ranks` opened; alone where there is none."""
    if not announced_ranks().are_many:
        return ALONE
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size(), announced_ranks().local_rank)


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started (it says so in the environment); alone without it.

    Tensors on the CPU are exchanged by gloo, those on CUDA by NCCL. Raises RanksError if not all come in time.
    """
    announced = announced_ranks()
    if not announced.are_many:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    if announced.local_rank < torch.cuda.device_count():  # else whoever wants a GPU says that there is none
        torch.cuda.set_device(announced.local_rank)
    try:
        with _ended_by_signals(), _said_to_wait(announced):
            _meet(announced)
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as exc:
        raise RanksError(
            f"could not join the {announced.world_size} processes that WORLD_SIZE announces "
            f"({str(exc).splitlines()[0]}); start them with torchrun, or unset WORLD_SIZE to work with one"
        ) from exc
    _joined.append(current_ranks())
    yield current_ranks()
    dist.destroy_process_group()  # not where one has failed: it would wait for what others still do


def _meet(announced: Ranks) -> None:
    """Return once all have come; raises torch's errors if some have not after a while, as those of a shell's variables.

    Later they wait for each other as long as a step of one takes.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=_TIME_TO_MEET))
    keys = [f"here/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{i}" for i in range(announced.world_size)]
    store.set(keys[announced.rank], "")
    store.wait(keys, _TIME_TO_MEET)


@contextmanager
def _said_to_wait(announced: Ranks) -> Iterator[None]:
    place = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    text = (
        f"rank {announced.rank} waits at {place} for the {announced.world_size} processes that WORLD_SIZE announces, "
        f"for {_TIME_TO_MEET.total_seconds():.0f} s at most\n"
    )
    timer = threading.Timer(_SAID_AFTER_S, sys.stderr.write, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def has_joined() -> bool:
    """Whether this process was ever among others that it joined; it can be so once."""
    return bool(_joined)


_joined: list[Ranks] = []


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Signals end the process at once: while it waits for those who never come, Python has no turn to handle any."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in ending_signals()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
