"""Entry point of `tristill` and `python -m pipeline`: turns every expected error into one message and an exit code."""

import sys

import click

from cache import CacheError
from pipeline.cli import cli
from pipeline.errors import PipelineError
from stages.errors import StageError
from stages.progress import say

_INTERRUPTED = 130


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 refused or failed, 2 usage, 130 interrupted."""
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        say("interrupted; run the same command again to go on")
        code = _INTERRUPTED
    except PipelineError as exc:
        say(f"error: {exc}")
        code = exc.exit_code
    except (CacheError, StageError) as exc:
        say(f"error: {exc}")
        code = 1
    except OSError as exc:
        say(f"error: {exc.filename or 'system'}: {exc.strerror or exc}; mend that and run the same command again")
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
