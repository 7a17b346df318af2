"""Starts a module on several processes of this machine: `python -m stages.launcher NUMBER MODULE ARGUMENT ...`.

It is `torchrun --standalone` without its own report of a failure, since the ranks say themselves what is wrong; it ends
with the exit code of the rank that did.
"""

import logging
import os
import signal
import sys

from stages.progress import say
from stages.visible import guard_output

_INTERRUPTED = 130
_TIME_TO_SAVE_S = 300
"""How long ranks have for a last checkpoint after an interrupt."""


def main() -> None:
    """Run the module on as many ranks as the first argument says; each gets its share of the cores."""
    guard_output()
    ranks, *module = sys.argv[1:]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // int(ranks))))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_TIME_TO_SAVE_S))
    for signum in (signal.SIGINT, signal.SIGTERM):  # until torchrun is there to pass them on
        signal.signal(signum, lambda *_: os._exit(_INTERRUPTED))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()
    try:
        run.main(["--standalone", "--nproc-per-node", ranks, "-m", *module])
    except ChildFailedError as exc:
        rank, failure = exc.get_first_failure()
        if failure.exitcode < 0:
            say(
                f"error: rank {rank} of {ranks} was ended by {failure.signal_name()}; the system does so where memory "
                "is short: run the same command again to go on"
            )
        sys.exit(max(1, failure.exitcode))
    except SignalException:
        sys.exit(_INTERRUPTED)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
