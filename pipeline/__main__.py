"""Entry point of `tristill` and `python -m pipeline`: turns every expected error into one message and an exit code."""

import signal
import sys

_INTERRUPTED = 130


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 refused or failed, 2 usage, 130 interrupted (Ctrl-C or SIGTERM)."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        code = _run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        code = _INTERRUPTED
    sys.exit(code)


def _run() -> int:
    # Imported here, so that an interrupt while Python loads is handled like any other.
    import click

    from cache import CacheError
    from pipeline.cli import cli
    from pipeline.errors import PipelineError
    from stages.errors import StageError
    from stages.progress import say

    try:
        return int(cli.main(standalone_mode=False) or 0)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except PipelineError as exc:
        say(f"error: {exc}")
        return exc.exit_code
    except (CacheError, StageError) as exc:
        say(f"error: {exc}")
    except OSError as exc:
        say(f"error: {exc.filename or 'system'}: {exc.strerror or exc}; mend that and run the same command again")
    return 1


if __name__ == "__main__":
    main()
