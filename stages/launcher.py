"""Starts a module on several processes: `python -m tristill.stages.launcher NUMBER MODULE ARGUMENT ...`.

It is `torchrun --standalone` without its own report of a failure, since the ranks say themselves what is wrong; it ends
with the exit code of the rank that did.
"""

import logging
import os
import signal
import socket
import sys

from tristill.stages.interrupt import ending_signals
from tristill.stages.progress import say
from tristill.stages.visible import guard_output

_ADDRESS = "127.0.0.1"
_INTERRUPTED = 130
_TIME_TO_SAVE_S = 300
"""How long ranks have for a last checkpoint after an interrupt."""


def main() -> None:
    """Run the module on as many ranks as the first argument says; each gets its share of the cores."""
    guard_output()
    ranks, *module = sys.argv[1:]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // int(ranks))))
    _require_loopback()
    # The ranks of one machine meet at its own address, whatever its name resolves to, or whether it does.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_TIME_TO_SAVE_S))
    for signum in ending_signals():  # until torchrun is there to pass them on
        signal.signal(signum, lambda *_: os._exit(_INTERRUPTED))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()
    try:
        run.main(["--standalone", "--local-addr", _ADDRESS, "--nproc-per-node", ranks, "-m", *module])
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


def _require_loopback() -> None:
    """End with a message where ranks could not meet: torch says so after a minute, from within C++."""
    try:
        with socket.create_server((_ADDRESS, 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
            pass
    except OSError as exc:
        say(
            f"error: {_ADDRESS}: ranks of one machine cannot meet there ({exc.strerror or exc}); bring the loopback "
            "interface up (`ip link set lo up`), or run without --ranks"
        )
        sys.exit(1)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
