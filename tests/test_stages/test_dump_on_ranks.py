"""Many ranks write the cache that one writes, whatever is kept, whatever is there, and however few shards there are."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_training import make_run
from torchrun import command, outcome

from tristill.stages.dump.config import DumpConfig
from tristill.stages.dump.dump import dump_logits
from tristill.stages.dump.progress import shown_progress
from tristill.stages.ranks import Ranks

DUMPS = """
import json, sys
from pathlib import Path
from tristill.stages.dump.config import DumpConfig
from tristill.stages.dump.dump import dump_logits
from tristill.stages.ranks import joined_ranks

run, folder = Path(sys.argv[1]), Path(sys.argv[2])
with joined_ranks() as ranks:
    for name, settings in json.loads(sys.argv[3]).items():
        config = DumpConfig.model_validate(settings)
        fingerprint = dump_logits(config, run / "data", run / "teacher", folder / name)
        (folder / f"{name}-{ranks.rank}.txt").write_text(fingerprint)
"""
MANY_SHARDS = {"hidden_layers": [0, 2], "calibration_windows": 32, "shard_positions": 8192, "batch_windows": 64}
CACHES: dict[str, dict[str, Any]] = {
    "default": {**MANY_SHARDS, "max_train_windows": 1400},
    "resumed": {**MANY_SHARDS, "max_train_windows": 3700},
    "one shard": {"max_train_windows": 50, "calibration_windows": 8},
    "no tables": {"profile": {"kind": "plain_topk", "top_k": 5}, "max_train_windows": 700, "shard_positions": 8192},
    "dense": {"profile": {"kind": "dense"}, "max_train_windows": 700, "shard_positions": 8192},
}
SHARDS = {"default": 3, "resumed": 6, "one shard": 1, "no tables": 2, "dense": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), num_files=160)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("world_size", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_any_number_of_ranks_writes_the_bytes_of_one(run: Path, tmp_path: Path, world_size: int) -> None:
    """Resumed: some shards are there, one of them damaged, one cut off, and what a killed rank was at."""
    for name, settings in CACHES.items():
        dump_logits(DumpConfig.model_validate(settings), run / "data", run / "teacher", tmp_path / "alone" / name)
    resumed = tmp_path / "ranks" / "resumed"
    shutil.copytree(tmp_path / "alone" / "resumed", resumed)
    (resumed / "cache.json").unlink()
    for n in (1, 5):
        (resumed / f"train-{n:05d}.h5").rename(resumed / f".train-{n:05d}.h5.partial")
    damaged = bytearray((resumed / "train-00002.h5").read_bytes())
    damaged[-100] ^= 1
    (resumed / "train-00002.h5").write_bytes(damaged)
    (resumed / "train-00003.h5").write_bytes(bytes(damaged[:1000]))
    kept = {n: (resumed / f"train-{n:05d}.h5").stat().st_ino for n in (0, 4)}
    script = tmp_path / "dumps.py"
    script.write_text(DUMPS)
    arguments = (str(run), str(tmp_path / "ranks"), json.dumps(CACHES))
    done = outcome(command(world_size, *arguments, program=(str(script),)))
    assert done.code == 0, done.stderr
    finished = re.findall(r"^dump-logits: .*\(100%\) positions", done.stderr, re.MULTILINE)
    assert len(finished) == len(CACHES), "the first rank alone speaks"
    for name in CACHES:
        assert files(tmp_path / "ranks" / name) == files(tmp_path / "alone" / name), name
        assert len(list((tmp_path / "alone" / name).glob("train-*.h5"))) == SHARDS[name]
        told = {(tmp_path / "ranks" / f"{name}-{rank}.txt").read_text() for rank in range(world_size)}
        assert len(told) == 1 and len(told.pop()) == 64  # noqa: PT018
    assert {n: (resumed / f"train-{n:05d}.h5").stat().st_ino for n in kept} == kept, "whole shards stay as they are"


@pytest.mark.parametrize("num_shards", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shards_are_dealt_evenly_and_each_once(num_shards: int, world_size: int) -> None:
    shares = [Ranks(rank, world_size).share_of(range(num_shards)) for rank in range(world_size)]
    assert sorted(shard for share in shares for shard in share) == list(range(num_shards))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for part in range(num_shards // world_size):
        front = range(part * world_size, (part + 1) * world_size)
        assert all(len(set(share) & set(front)) == 1 for share in shares), "all work at the same part"


def test_the_first_rank_shows_what_all_have_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of others what lies in the folder counts; a damaged shard that lies there already does not."""
    (tmp_path / "train-00001.h5").touch()
    others = {"train-00001.h5": 100, "train-00003.h5": 200, "train-00005.h5": 400}
    with shown_progress(Ranks(0, 2), tmp_path, 5000, 4000, others) as advance:
        advance(500)
        (tmp_path / "train-00003.h5").touch()
        said = ""
        while "\n" not in said:
            said += capsys.readouterr().err
    assert said.startswith("dump-logits: 1,700 of 5,000 (34%) positions")
    assert capsys.readouterr().err.splitlines()[-1].startswith("dump-logits: 5,000 of 5,000 (100%) positions")
    with shown_progress(Ranks(1, 2), tmp_path, 5000, 4000, {}) as advance:
        advance(500)
    assert not capsys.readouterr().err
