"""Entry point of `tristill` and `python -m tristill.pipeline`: turns every error into one message and an exit code."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from tristill.pipeline.rank_failure import another_has_told, raise_once, tell, was_ended
from tristill.stages.errors import RanksError
from tristill.stages.interrupt import ending_signals
from tristill.stages.ranks import ALONE, Ranks, announced_ranks, exit_code_of
from tristill.stages.visible import Painted, guard_output, open_closed_descriptors

_INTERRUPTED = 130
_DEBUG_VARIABLE = "TRISTILL_DEBUG"
_SHORT_OF_MEMORY = ("can't allocate memory", "out of memory", "failed to map segment", "Cannot allocate memory")
"""How torch and the system's loader say it, whose exceptions are of no kind of their own."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 refused or failed, 2 usage, 130 interrupted (Ctrl-C, SIGTERM, ..)."""
    open_closed_descriptors()
    guard_output()
    if not os.environ.get(_DEBUG_VARIABLE):
        os.environ["RUST_BACKTRACE"] = "0"  # libraries written in Rust print it where they panic
    interrupts = _Interrupts()
    try:
        interrupts.catch()
        announced_ranks()
        code = _run(interrupts)
    except KeyboardInterrupt:
        interrupts.are_over = True
        _end_interrupted()
    except SystemExit:
        raise
    except RanksError as exc:
        code = _failed(f"error: {exc}")
    except BaseException as exc:  # noqa: BLE001 - a library written in Rust raises such where it panics
        code = _unexpected(exc)
    if _ranks().are_many:
        interrupts.are_over = True  # torchrun ends the others, and sends a signal to this one too
        _end(code)  # at once: threads of gloo may outlive their group, and C++ aborts if the interpreter goes first
    sys.exit(code)


def _ranks() -> Ranks:
    """Those that are announced; alone where that makes no sense, which `_run` tells."""
    with suppress(RanksError):
        return announced_ranks()
    return ALONE


def _unexpected(error: BaseException) -> int:
    """Tells what no code of ours foresaw: memory that is short, or a fault of this program."""
    if os.environ.get(_DEBUG_VARIABLE):
        import traceback

        traceback.print_exception(error)
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, MemoryError) or any(words in str(error) for words in _SHORT_OF_MEMORY):
        said = f"memory is short ({said}); free some, raise its limit, or lower sizes and run the same command again"
    elif isinstance(error, UnicodeEncodeError) or "surrogates not allowed" in str(error):
        said = f"found a name that is not UTF-8 text ({error}); rename the file or folder, or set LC_ALL=C.UTF-8"
    elif type(error).__name__ == "PanicException":  # of no module that can be imported
        said = f"a library fails on a file ({error}), as on a tokenizer.json whose rules take too long; use another"
    else:
        said = f"found a fault of tristill, {said}; set {_DEBUG_VARIABLE}=1 to see where, and report it"
    return _failed(f"error: {said}")


def _failed(text: str) -> int:
    """The exit code, once the user is told."""
    if _ranks().are_many:
        tell(text)
    else:
        sys.stderr.write(text + "\n")
    return 1


class _Interrupts:
    """Turns SIGINT, SIGTERM and SIGHUP into KeyboardInterrupt.

    While modules load, when nothing is there to be saved, the process ends at once: extension modules print such an
    exception that comes while they are set up, and go on with others.

    `run` sends a SIGTERM after the SIGINT that a terminal sends to all: that is one wish, not two. Handlers say so,
    and stay: Python complains of a signal that was noted by a handler that is no longer there.
    """

    def __init__(self) -> None:
        self._are_asked = False
        self.are_loading = True
        self.are_over = False

    def catch(self) -> None:
        for signum in ending_signals():
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.are_loading:
            _end_interrupted()
        if not self.are_over and not (self._are_asked and signum != signal.SIGINT):
            self._are_asked = True
            signal.default_int_handler(signum, frame)


def _end_interrupted() -> NoReturn:
    """End at once: all that is kept is on disk by now.

    Python's own way out would wait for worker threads, or, if a second signal ends that wait, tear the interpreter
    down under threads that are inside of torch, and C++ then aborts the process.
    """
    with suppress(OSError):  # nobody may be left to read
        if _ranks().is_first and not another_has_told():
            sys.stderr.write("interrupted; run the same command again to go on\n")
    _end(_INTERRUPTED)


def _end(code: int) -> NoReturn:
    with suppress(OSError):
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(code)


def _run(interrupts: _Interrupts) -> int:
    # Imported here, so that an interrupt while Python loads is handled too.
    import click

    from tristill.cache import CacheError
    from tristill.pipeline.cli import cli
    from tristill.pipeline.errors import PipelineError
    from tristill.stages.errors import LostRankError, OtherRankError, StageError
    from tristill.stages.progress import say

    interrupts.are_loading = False
    are_many = _ranks().are_many
    show = tell if are_many else say
    try:
        try:
            return int(cli.main(standalone_mode=False) or 0)
        except click.exceptions.Abort:
            raise KeyboardInterrupt from None
        except Exception as exc:  # noqa: BLE001 - raised, or told by another
            raise_once(exc)
    except click.ClickException as exc:
        if are_many:
            tell(f"error: {exc.format_message()}")
        elif isinstance(exc, click.exceptions.NoArgsIsHelpError):
            sys.stderr.write(Painted(exc.format_message() + "\n"))
        else:
            exc.show()
        return exc.exit_code
    except OtherRankError as exc:
        was_ended()
        return exc.exit_code
    except LostRankError as exc:
        if not was_ended():
            tell(f"error: {exc}")
        return 1
    except (PipelineError, CacheError, StageError) as exc:
        show(f"error: {exc}")
        return exit_code_of(exc)
    except OSError as exc:
        show(f"error: {exc.filename or 'system'}: {exc.strerror or exc}; mend that and run the same command again")
        return 1


if __name__ == "__main__":
    main()
