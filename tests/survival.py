"""What the tests of kills and failing systems share: a run of every stage in a few seconds, and what of it is final."""

import csv
import io
import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked_commands import Commands, Ended

from conftest import ENVIRONMENT, ROOT

TIMED = {
    "elapsed_s",
    "earlier_s",
    "finished_at",
    "is_resumed",
    "peak_rss_mib",
    "positions_per_s",
    "ledger",
    "ledger_missing",
}
"""Fields of JSON records that tell of times, speeds and memory: all that may differ from an uninterrupted run."""
UNLIKE = {"study.db", "place"}
"""Optuna's data base holds dates; the place of a sweep is drawn at random. The students' numbers are in results.json."""
_OPTIONS_OF_NO_NUMBERS = re.compile(r" --run-dir [^ \"]*| --force| --set [^ \"]*")
_WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "and",
    "ran",
    "far",
    "red",
    "blue",
    "of",
    "to",
    "in",
    "it",
    "was",
    "who",
    "why",
    "how",
]
_CONFIG = """
[data]
source = { kind = "text", paths = [CORPUS] }
tokenizer = { kind = "bpe", vocab_size = 300, train_bytes = 20_000 }
context_length = 64
validation_fraction = 0.2

[teacher]
model = { width = 32, layers = 1, heads = 2, mlp_width = 64 }

[teacher.training]
steps = 12
batch_windows = 4
learning_rate = 3e-3
warmup_steps = 2
checkpoint_every = 3
log_every = 4

[cache]
profile = { kind = "transform", step = 0.2, temperatures = [1.0] }
calibration_windows = 16
hidden_layers = [1]
shard_positions = 1024

[student]
model = { width = 256, layers = 1, heads = 2, mlp_width = 256 }

[distill.training]
steps = 6
batch_windows = 2
learning_rate = 3e-3
warmup_steps = 2
checkpoint_every = 2
"""
_SWEEP = """
base = BASE

[vary]
distill.alpha = [0.2, 0.8]
distill.training.steps = [4]
"""


@dataclass(frozen=True)
class Stage:
    """A command, what it makes, and what it needs of a run. guard: a later command, which refuses what is unfinished."""

    name: str
    arguments: tuple[str, ...]
    artefact: str
    needs: tuple[str, ...]
    guard: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def has_study(self) -> bool:
        return self.arguments[0] == "sweep"


_CACHED = ("distill", "--targets", "cached", "--name", "guard")
_GENERATE = ("generate", "student", "--prompt", "the", "--max-tokens", "1")
STAGES = {
    stage.name: stage
    for stage in (
        Stage("tokenize", ("tokenize",), "data", (), ("teacher",), "run `tristill tokenize`"),
        Stage("teacher", ("teacher",), "teacher", ("data",), ("dump-logits",), "run `tristill teacher`"),
        Stage("dump-logits", ("dump-logits",), "cache", ("data", "teacher"), _CACHED, "run `tristill dump-logits`"),
        Stage("distill", ("distill",), "students/student", ("data", "teacher", "cache"), _GENERATE, "student"),
        Stage("sweep", ("sweep",), "sweeps/sweep", ("data", "teacher", "cache")),
        *(
            Stage(f"export {name}", ("export", "--format", name), "exports/student", ("data", "students"))
            for name in ("gguf", "hf", "bitnet")
        ),
    )
}  # fmt: skip


class Runs:
    """Runs of one config, by forked processes."""

    def __init__(self, folder: Path, launcher: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.corpus = folder / "corpus"
        self.corpus.mkdir()
        generator = random.Random(0)
        for number in range(60):
            lines = [" ".join(generator.choice(_WORDS) for _ in range(14)) for _ in range(28)]
            (self.corpus / f"{number:02}.txt").write_text("\n".join(lines))
        self.config = folder / "small.toml"
        self.config.write_text(_CONFIG.replace("CORPUS", json.dumps(str(self.corpus))))
        self._sweep = folder / "sweep.toml"
        self._sweep.write_text(_SWEEP.replace("BASE", json.dumps(str(self.config))))
        self.commands = Commands(folder, environment=ENVIRONMENT, cwd=ROOT, launcher=launcher)
        self.whole = folder / "whole"
        self.changes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def run(self, run_dir: Path, *arguments: str, commands: Commands | None = None, **how: Any) -> Ended:
        config = self._sweep if arguments[0] == "sweep" else self.config
        return (commands or self.commands).run(*arguments, "--config", str(config), run_dir=run_dir, **how)

    def finish_whole(self) -> None:
        """Every stage without an interruption; notes how many changes each makes, and how long it takes."""
        for stage in STAGES.values():
            ended = self.run(self.whole, *stage.arguments, counts_sql=stage.has_study)
            assert ended.code == 0, ended.stderr
            self.changes[stage.name], self.seconds[stage.name] = ended.changes, ended.elapsed_s

    def before(self, stage: Stage, to: Path) -> Path:
        """A run folder in which a stage is the next."""
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir()
        for name in stage.needs:
            shutil.copytree(self.whole / name, to / name)
        return to

    def final(self, run_dir: Path, stage: Stage) -> dict[str, Any]:
        """Every folder and file of a stage's artefact, without TIMED and UNLIKE."""
        return {
            name: found
            for name, found in content(run_dir / stage.artefact).items()
            if stage.arguments[0] != "export" or _is_of(name, stage.arguments[-1])
        }


def _is_of(name: str, export_format: str) -> bool:
    return export_format in name.split("/", maxsplit=1)[0]


def content(folder: Path) -> dict[str, Any]:
    """Relative names to bytes, or to what is left of a record; None for folders."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else _final(path)
        for path in sorted(folder.rglob("*"))
        if path.name not in UNLIKE
    }


def _final(path: Path) -> Any:
    if path.suffix in {".json", ".jsonl"} and path.name not in {"cache.json", "tokenizer.json", "data.json"}:
        text = _OPTIONS_OF_NO_NUMBERS.sub("", path.read_text(encoding="utf-8"))
        return [_untimed(json.loads(part)) for part in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        return [{key: value for key, value in row.items() if key.split(".")[-1] not in TIMED} for row in rows]
    return path.read_bytes()


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(part) for key, part in value.items() if key not in TIMED}
    return [_untimed(part) for part in value] if isinstance(value, list) else value


def started_runs(folder: Path, launcher: tuple[str, ...] = ()) -> Iterator[Runs]:
    """Runs with the whole one finished; for a fixture."""
    runs = Runs(folder, launcher)
    with runs.commands:
        runs.finish_whole()
        yield runs
