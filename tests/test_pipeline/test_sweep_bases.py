"""Sweeps over bases of other kinds: a teacher of transformers, and chats of which few positions count."""

from pathlib import Path

import numpy as np
import pytest
from chats import make_tokenizer, some_chats, write_json_lines
from small_models import KINDS, write_corpus, write_model, write_tokenizer

from tristill.pipeline.config import load_config
from tristill.pipeline.errors import ConfigError
from tristill.pipeline.provenance import read_provenance, write_provenance
from tristill.pipeline.runner import execute
from tristill.pipeline.steps import Distill, all_steps
from tristill.pipeline.sweep.check import check_sweep
from tristill.pipeline.sweep.config import load_sweep
from tristill.pipeline.sweep.ledger import ledger, ledger_text
from tristill.pipeline.sweep.results import Ledger, SweepResults
from tristill.pipeline.sweep.run import run_sweep
from tristill.pipeline.sweep.student import Base
from tristill.pipeline.workspace import Workspace

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

GIVEN = """
[data]
source = { kind = "text", paths = ["FOLDER/corpus.txt"], documents = "line" }
tokenizer = { kind = "file", path = "FOLDER/gpt2" }
context_length = 24
validation_fraction = 0.2
max_train_tokens = 4_000
max_validation_tokens = 800

[teacher]
path = "FOLDER/gpt2"

[cache]
profile = { kind = "dense" }
max_train_windows = 64
batch_windows = 16

[student]
init = "teacher"
quantize.layers = ["PATTERN"]

[distill]
training = { steps = 5, batch_windows = 4, learning_rate = 1e-3 }
"""
CHATS = """
[data]
source = { kind = "records", paths = ["FOLDER/rows.jsonl"], chat_column = "messages" }
tokenizer = { kind = "file", path = "FOLDER/tokenizer" }
context_length = 16
validation_fraction = 0.2

[teacher]
model = { width = 32, layers = 1, heads = 2, mlp_width = 64 }
training = { steps = 4, batch_windows = 4, learning_rate = 3e-3 }

[cache]
profile = { kind = "transform", step = 0.1 }
calibration_windows = 32

[evaluate]
batch_windows = 1

[distill]
training = { steps = 5, batch_windows = 4, learning_rate = 3e-3 }
"""
SWEEP = """
base = "FOLDER/base.toml"
pruning = { kind = "median", every = 2, windows = 1 }

[vary]
distill.alpha = [0.2, 0.6]
"""


def make_base(folder: Path, text: str) -> None:
    """Every step up to the cache, and a sweep beside it."""
    for name, content in (("base", text), ("alphas", SWEEP)):
        (folder / f"{name}.toml").write_text(content.replace("FOLDER", str(folder)))
    for step in all_steps(Workspace(load_config(folder / "base.toml"), folder / "run")):
        if not isinstance(step, Distill):
            execute(step)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    write_corpus(folder / "corpus.txt")
    write_model(folder / "gpt2", "gpt2", write_tokenizer(folder / "tokenizer.json"))
    make_base(folder, GIVEN.replace("PATTERN", KINDS["gpt2"][2]))
    return folder


def opened(folder: Path, *changes: str) -> tuple[Path, Base]:
    path = folder / "alphas.toml"
    sweep, of_base = load_sweep(path, changes)
    return path, Base(sweep, path, of_base, folder / "run")


def sweep(folder: Path) -> SweepResults:
    path, base = opened(folder)
    return run_sweep(load_sweep(path, ())[0], base)


def test_a_sweep_over_a_given_teacher_of_transformers(given: Path) -> None:
    found = sweep(given)
    assert [trial.state for trial in found.trials] == ["complete"] * 2
    assert [[step for step, value in trial.looks if value] for trial in found.trials] == [[2, 4]] * 2
    assert found.trials[0].value != found.trials[1].value
    assert found.ledger is not None, found.ledger_missing
    assert (found.ledger.teacher_s, found.ledger.teacher_steps, found.ledger.is_teacher_given) == (None, (), True)
    assert "ledger: the teacher was given. Its cache took" in ledger_text(found.ledger)


def test_a_dump_that_went_on_after_a_kill_took_at_least_what_is_known(given: Path) -> None:
    cache = given / "run" / "cache"
    record = read_provenance(cache)
    assert record is not None
    write_provenance(cache, record.model_copy(update={"is_resumed": True}))
    found = ledger(opened(given)[1], [(1.0, 2.0)], [(1.0, 10)])
    write_provenance(cache, record)
    assert isinstance(found, Ledger)
    assert (found.dump_s, found.at_least) == (record.elapsed_s, ("dump_s",))


def test_keys_of_a_shape_of_transformers_cannot_be_varied_and_a_whole_shape_helps(given: Path) -> None:
    change = "vary={'student.model.layers'=[1, 2]}"
    own = "student={model={width=32, layers=2, heads=2, mlp_width=64}, init='random'}"
    for changes in ((change,), (change, "cache.max_train_windows=64")):
        path, base = opened(given, *changes)
        with pytest.raises(ConfigError) as caught:
            check_sweep(load_sweep(path, changes)[0], base)
        assert str(caught.value).splitlines()[1:] == [
            (
                "  vary.student.model.layers: the base's student has a shape of transformers (gpt2), which has no such key; "
                "to vary keys of it, give a whole student.model, a shape of our own transformer, in the base"
            )
        ]
    path, base = opened(given, change, own)
    check_sweep(load_sweep(path, (change, own))[0], base)


def test_a_sweep_over_chats_looks_at_windows_in_which_nothing_counts(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "rows.jsonl", [{"messages": chat} for chat in some_chats(100)])
    make_tokenizer(tmp_path / "tokenizer")
    make_base(tmp_path, CHATS)
    assert not np.load(tmp_path / "run" / "data" / "validation-mask.npy")[:17].any(), "a look begins with such a window"
    found = sweep(tmp_path)
    assert [trial.state for trial in found.trials] == ["complete"] * 2
    assert [[step for step, value in trial.looks if value] for trial in found.trials] == [[2, 4]] * 2
