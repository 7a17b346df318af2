"""How one of many ranks ends, so that a user reads once what is wrong, in our words and in torchrun's report."""

import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from tristill.stages.errors import LostRankError, RanksError
from tristill.stages.ranks import LOST, announced_ranks, has_joined, is_loss_of_ranks, joined_ranks

_ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Where torchrun looks for the reason of a failure: pytorch.org/docs/stable/elastic/errors.html."""
_PATIENCE_S = 5.0


def raise_once(error: Exception) -> NoReturn:
    """Raise it. Where it kept this rank from joining the others, only the lowest rank that has one raises its own.

    The others, which may have come here too or be about to begin, end with OtherRankError. What torch says where
    another rank is gone becomes LostRankError.
    """
    if not announced_ranks().are_many or isinstance(error, RanksError):
        raise error
    if is_loss_of_ranks(error):
        raise LostRankError(LOST) from error
    if not has_joined():
        with joined_ranks() as ranks, ranks.agreeing():
            raise error
    raise error


def tell(text: str) -> None:
    """Says what is wrong, unless another rank of this machine has done so; also for torchrun's report."""
    if another_has_told():
        return
    from tristill.cache.secrets import masked  # with numpy, after signals are handled

    text = masked(text)
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    if path := os.environ.get(_ERROR_FILE_VARIABLE):
        shown = {"py_callstack": text, "timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": text, "extraInfo": shown}})
        Path(path).write_text(content, encoding="utf-8")


def another_has_told() -> bool:
    """Whether another rank of this machine has failed, and has said why."""
    path = os.environ.get(_ERROR_FILE_VARIABLE)  # .../<rank>/error.json
    return path is not None and any(Path(path).parent.parent.glob("*/" + Path(path).name))


def was_ended() -> bool:
    """Whether torchrun ended this rank within a while: its report names the rank that ends first as the cause."""
    try:
        time.sleep(_PATIENCE_S)
    except KeyboardInterrupt:
        return True
    return False
