"""Processes that work together tell each other what they need to know."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ENVIRONMENT, ROOT
from tristill.stages.errors import RanksError
from tristill.stages.ranks import ALONE, announced_ranks, current_ranks, joined_ranks

SAYS = """
import json, sys
from tristill.stages.errors import OtherRankError, StageError
from tristill.stages.ranks import current_ranks, joined_ranks
with joined_ranks() as ranks:
    ranks.wait_for_all()
    found = ranks.gathered({"rank": ranks.rank, "of": [ranks.world_size], "text": "x" * ranks.rank})
    word = ranks.from_first("first" if ranks.is_first else "not first")
    with ranks.agreeing():
        pass
    try:
        with ranks.agreeing():
            if ranks.rank > 0:
                error = StageError(f"on rank {ranks.rank}")
                error.exit_code = 2 + ranks.rank
                raise error
        end = None
    except StageError as exc:
        end = [type(exc).__name__, str(exc), exc.exit_code]
    sys.stdout.write(json.dumps([ranks.rank, found, word, current_ranks() == ranks, end]) + "\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_learns_what_all_have_said_in_their_order(world_size: int, tmp_path: Path) -> None:
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    done = subprocess.run(
        [*launch, str(script)],
        check=False,
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = sorted(json.loads(line) for line in done.stdout.splitlines())
    all_found = [{"rank": rank, "of": [world_size], "text": "x" * rank} for rank in range(world_size)]
    told = ["OtherRankError", "rank 1 has failed, and says why", 3]
    ends = [["StageError", "on rank 1", 3] if rank == 1 else told for rank in range(world_size)]
    assert said == [[rank, all_found, "first", True, ends[rank]] for rank in range(world_size)]


def test_a_process_without_torchrun_is_alone() -> None:
    with joined_ranks() as ranks:
        assert ranks == ALONE == current_ranks()
        assert ranks.gathered([1]) == [[1]]
        assert ranks.from_first("word") == "word"


@pytest.mark.parametrize(
    "environment", [{}, {"RANK": "0", "MASTER_ADDR": "localhost"}], ids=["nothing else", "no port"]
)
def test_a_world_size_without_torchrun_is_an_error_that_says_so(environment: dict[str, str]) -> None:
    code = "from tristill.stages.ranks import joined_ranks\nwith joined_ranks(): pass"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT,
        env={**ENVIRONMENT, "WORLD_SIZE": "2", **environment},
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "tristill.stages.errors.RanksError: could not join the 2 processes that WORLD_SIZE announces ("
    )
    assert last.endswith("start them with torchrun, or unset WORLD_SIZE to work with one")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: found 'abc' in the environment, expected 1 to "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: found '0'"),
        (
            {"WORLD_SIZE": "2", "RANK": "2"},
            "RANK: found '2' in the environment, expected 0 to 1, as torchrun sets it; ",
        ),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK: found 'x'"),
    ],
)
def test_variables_that_announce_no_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RanksError, match=re.escape(message)):
        announced_ranks()


def test_ranks_that_never_come_are_told_and_waited_for_a_while() -> None:
    """As where a shell still has the variables of a job that has ended."""
    script = """
from datetime import timedelta
from tristill.stages import ranks
ranks._TIME_TO_MEET, ranks._SAID_AFTER_S = timedelta(seconds=2), 0.5
with ranks.joined_ranks():
    pass
"""
    stale = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**ENVIRONMENT, **stale},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "rank 0 waits at 127.0.0.1:0 for the 2 processes that WORLD_SIZE announces, for 2 s at most" in done.stderr
    assert "RanksError: could not join the 2 processes that WORLD_SIZE announces (" in done.stderr
