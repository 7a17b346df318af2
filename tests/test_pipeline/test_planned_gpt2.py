"""Plan and report of a run whose teacher and student are models of transformers."""

import json

import pytest
from pseudo_terminal import tristill_on_a_terminal
from small_models import write_corpus, write_model, write_tokenizer
from small_sweep import LEDGER, write_sweep

from tristill.pipeline.config import load_config
from tristill.pipeline.plan.compare import compare
from tristill.pipeline.plan.planning import Budget, plan_of
from tristill.pipeline.report.cache import cache_section
from tristill.pipeline.report.costs import costs_section
from tristill.pipeline.report.page import REPORT_NAME
from tristill.pipeline.report.run import read_run
from tristill.pipeline.report.section import Section, Table, Text
from tristill.pipeline.report.summary import tiles
from tristill.pipeline.report.teacher import teacher_section
from tristill.pipeline.runner import execute
from tristill.pipeline.steps import all_steps
from tristill.pipeline.workspace import Workspace

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

GPT2 = """
[data]
source = { kind = "text", paths = ["FOLDER/corpus.txt"], documents = "line" }
tokenizer = { kind = "file", path = "FOLDER/gpt2" }
context_length = 24
validation_fraction = 0.2
max_train_tokens = 6_000
max_validation_tokens = 1_000

[teacher]
path = "FOLDER/gpt2"
dtype = "bfloat16"

[cache]
profile = { kind = "dense" }
max_train_windows = 128
batch_windows = 16

[student]
init = "teacher"
quantize.layers = ["transformer.h.*"]

[distill]
training = { steps = 6, batch_windows = 4, learning_rate = 1e-3, checkpoint_every = 3 }
"""


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run, which was planned when it had nothing but tokens."""
    folder = tmp_path_factory.mktemp("gpt2")
    write_corpus(folder / "corpus.txt")
    write_model(folder / "gpt2", "gpt2", write_tokenizer(folder / "tokenizer.json"))
    (folder / "config.toml").write_text(GPT2.replace("FOLDER", str(folder)))
    workspace = Workspace(load_config(folder / "config.toml"), folder / "run")
    tokenize, *others = all_steps(workspace)
    execute(tokenize)
    plan_of(workspace, Budget(0.3, 5.0))
    for step in others:
        execute(step)
    return workspace


def texts(section: Section) -> str:
    return " ".join(block.text for block in section.blocks if isinstance(block, Text))


def test_a_run_of_gpt2_is_what_was_planned(gpt2: Workspace) -> None:
    rows = compare(gpt2)
    assert {"teacher", "dump-logits", "distill --name student"} <= {row.what.split(":")[0] for row in rows}
    exact = [row for row in rows if row.unit == "positions"]
    assert [row.predicted for row in exact] == [row.happened for row in exact]
    sizes = [row for row in rows if row.unit == "bytes"]
    assert sizes[-1].what == "dump-logits: all files"
    for row in sizes:
        assert row.happened == pytest.approx(row.predicted, rel=0.02), row
    described = json.loads((gpt2.student("student") / "config.json").read_text())
    assert described["hugging_face"]["model_type"] == "gpt2"


def test_the_report_of_a_given_teacher_says_what_it_is(gpt2: Workspace) -> None:
    run = read_run(gpt2)
    assert "(bfloat16), given as a finished checkpoint and not trained here" in texts(teacher_section(run))
    assert next(tile for tile in tiles(run) if tile.label == "Teacher").note.endswith("parameters, bfloat16")
    assert "The cache is paid once" in texts(costs_section(run))
    assert "There is no log-partition curve" not in texts(cache_section(run))


def test_a_ledger_charges_nothing_for_a_given_teacher(gpt2: Workspace) -> None:
    assert LEDGER.teacher_s is not None
    write_sweep(gpt2.run_dir)
    tables = [block for block in costs_section(read_run(gpt2)).blocks if isinstance(block, Table)]
    assert ("teacher, paid either way", "given, not trained here") in tables[-1].rows


def test_the_report_says_on_a_terminal_who_writes(gpt2: Workspace) -> None:
    config = str(gpt2.run_dir.parent / "config.toml")
    code, sent = tristill_on_a_terminal("report", "--config", config, "--run-dir", str(gpt2.run_dir))
    assert code == 0, sent
    assert "report: teacher writes: " in sent
    assert "report: student writes: " in sent
    assert "wrote nothing" not in (gpt2.run_dir / REPORT_NAME).read_text(encoding="utf-8")
