"""How many threads torch takes per operator, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(num_threads: int) -> Iterator[Callable[[], None]]:
    """Give this thread `num_threads` threads of torch per operator, and every thread that calls what is yielded."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield lambda: torch.set_num_threads(num_threads)
    finally:
        torch.set_num_threads(before)


def num_threads() -> int:
    """Threads that torch takes per operator here."""
    return torch.get_num_threads()
