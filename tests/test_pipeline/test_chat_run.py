"""A chat corpus by the command line: tokenize, teacher, dump, distil, evaluate, look, repair, plan, report."""

import json
import shutil
from pathlib import Path

import pytest
from chats import make_tokenizer, some_chats, write_json_lines

from conftest import Outcome, tristill
from tristill.pipeline.config import load_config
from tristill.pipeline.plan.compare import compare
from tristill.pipeline.plan.prediction import PLAN_NAME, load_plan
from tristill.pipeline.report.data import data_section
from tristill.pipeline.report.page import REPORT_NAME
from tristill.pipeline.report.run import Run, read_run
from tristill.pipeline.report.section import Figure, Table, Text
from tristill.pipeline.report.teacher import teacher_section
from tristill.pipeline.workspace import Workspace
from tristill.stages.data.tokenized import load_corpus

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

CONFIG = """
[data]
source = { kind = "records", paths = ["ROWS"], chat_column = "messages" }
tokenizer = { kind = "file", path = "TOKENIZER" }
context_length = 16
validation_fraction = 0.2

[teacher]
model = { width = 32, layers = 2, heads = 2, mlp_width = 64 }
training = { steps = 8, batch_windows = 4, learning_rate = 3e-3 }

[cache]
profile = { kind = "transform", step = 0.1 }
calibration_windows = 32
hidden_layers = [1]
shard_positions = 4096

[distill]
alpha = 0.5
hidden = { weight = 0.1, layers = { 1 = 1 } }
training = { steps = 6, batch_windows = 4, learning_rate = 3e-3 }
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    rows = write_json_lines(folder / "rows.jsonl", [{"messages": chat} for chat in some_chats(150)])
    config = CONFIG.replace("ROWS", str(rows)).replace("TOKENIZER", str(make_tokenizer(folder / "tokenizer")))
    (folder / "chats.toml").write_text(config)
    outcome = tristill("run", "--until", "distill", *place(folder))
    assert outcome.code == 0, outcome.stderr
    return folder


def place(folder: Path) -> list[str]:
    return ["--config", str(folder / "chats.toml"), "--run-dir", str(folder / "run")]


def test_a_chat_corpus_goes_from_text_to_an_evaluated_student_and_is_then_up_to_date(run: Path) -> None:
    data = json.loads((run / "run" / "data" / "data.json").read_text())
    summary = json.loads((run / "run" / "students" / "student" / "summary.json").read_text())
    assert summary["targets"] == "cached"
    assert summary["validation"]["positions"] < 0.4 * data["splits"]["validation"]["tokens"]
    assert summary["validation"]["kl_to_teacher_nats"] > 0
    before = {path: path.stat().st_mtime_ns for path in (run / "run").rglob("*.h5")}
    outcome = tristill("run", "--until", "distill", *place(run))
    assert outcome.code == 0, outcome.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_chat_template_makes_other_tokens(run: Path) -> None:
    template = run / "tokenizer" / "chat_template.jinja"
    before = template.read_text()
    template.write_text(before + "{# changed #}")
    outcome = tristill("tokenize", *place(run))
    template.write_text(before)
    assert outcome.code == 1
    assert "chat template" in outcome.stderr
    assert tristill("tokenize", *place(run)).code == 0


def test_the_cache_says_what_it_holds_and_is_repaired(run: Path) -> None:
    found = tristill("cache", "info", *place(run))
    assert "(format version 3)" in found.stdout
    assert "positions that count" in found.stdout or "that count (" in found.stdout
    info = json.loads(tristill("cache", "info", "--json", *place(run)).stdout)
    counted = sum(info["positions"].values())
    assert 0.05 < counted / sum(info["windows_positions"].values()) < 0.4
    assert info["bytes_per_position"]["on disk"] == pytest.approx(info["file_bytes"] / counted)
    assert "mask" in info["bytes_per_position"]
    shard = run / "run" / "cache" / "train-00000.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert tristill("cache", "verify", *place(run)).code == 1
    repaired = tristill("cache", "repair", *place(run))
    assert repaired.code == 0, repaired.stderr
    assert shard.read_bytes() == whole
    seen: Outcome = tristill("cache", "peek", *place(run))
    assert seen.code == 0, seen.stderr
    seen = tristill("cache", "peek", "--positions", "16", "--windows", "20", *place(run))
    rows = [
        [cell.strip() for cell in line.split(" | ")]
        for line in seen.stdout.splitlines()
        if line[:3].strip("| ").isdigit()
    ]
    nothing = [row for row in rows if row[-1].startswith("does not count")]
    assert 0 < len(nothing) < len(rows)
    assert all((row[-3:-1] == ["-", "-"]) == (row in nothing) for row in rows)


def test_forcing_another_corpus_leaves_no_mask_behind(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the moon met a fox. \n\n" * 400)
    text = 'data.source={kind="text", paths=["' + str(tmp_path / "text.txt") + '"], documents="paragraph"}'
    copy = tmp_path / "run" / "data"
    copy.mkdir(parents=True)
    for path in (run / "run" / "data").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    arguments = ["--config", str(run / "chats.toml"), "--run-dir", str(tmp_path / "run")]
    assert list(copy.glob("*-mask.npy"))
    many = tmp_path / "many.txt"
    many.write_text("".join(f"the moon met fox {n}.\n\n" for n in range(400)))
    outcome = tristill("tokenize", "--force", *arguments, "--set", text.replace("text.txt", "many.txt"))
    assert outcome.code == 0, outcome.stderr
    assert not list(copy.glob("*-mask.npy"))


def copied(run: Path, to: Path) -> Run:
    shutil.copytree(run / "run", to)
    return read_run(Workspace(load_config(run / "chats.toml"), to))


def test_a_run_of_chats_is_what_was_planned(run: Path, tmp_path: Path) -> None:
    found = copied(run, tmp_path / "run")
    fresh = ["--config", str(run / "chats.toml"), "--run-dir", str(tmp_path / "fresh")]
    outcome = tristill("plan", "--seconds", "0.3", "--teacher-seconds", "5", *fresh)
    assert outcome.code == 0, outcome.stderr
    shutil.copy(tmp_path / "fresh" / PLAN_NAME, tmp_path / "run")
    rows = compare(found.workspace)
    exact = [row for row in rows if row.unit == "positions"]
    assert len(exact) == 5
    assert [row.predicted for row in exact] == [row.happened for row in exact]
    for row in rows:
        assert row.unit != "bytes" or row.happened == pytest.approx(row.predicted, rel=0.02), row
    plan = load_plan(tmp_path / "run")
    assert plan is not None
    splits = load_corpus(found.workspace.data).splits
    assert plan.cache.positions == {split: (splits[split].tokens - 1) // 16 * 16 for split in splits}
    every = f"{sum(plan.cache.positions.values()):,}"  # so small a corpus is rehearsed whole
    assert plan.stages[2].basis == f"{every} positions measured of {every}"


def test_the_report_says_what_counts(run: Path, tmp_path: Path) -> None:
    found = copied(run, tmp_path / "run")
    outcome = tristill("report", "--run-dir", str(tmp_path / "run"))
    assert outcome.code == 0, outcome.stderr
    assert "wrote nothing" not in (tmp_path / "run" / REPORT_NAME).read_text(encoding="utf-8")
    section = data_section(found)
    text = section.blocks[0]
    assert isinstance(text, Text)
    assert text.text.startswith("The corpus is chats of files of records: ")
    assert "asks for the next token" not in text.text
    splits = load_corpus(found.workspace.data).splits
    counted = [split.counted.tokens for split in splits.values() if split.counted]
    assert f"{sum(counted):,} tokens, " in text.text
    table = section.blocks[1]
    assert isinstance(table, Table)
    place = table.header.index("tokens that count")
    assert [row[place] for row in table.rows] == [f"{count:,}" for count in counted]


def test_a_batch_without_a_label_is_not_the_last_loss(run: Path, tmp_path: Path) -> None:
    found = copied(run, tmp_path / "run")
    log = found.workspace.run_dir / "teacher" / "metrics.jsonl"
    (record, *_) = [json.loads(line) for line in log.read_text().splitlines()]
    records = [{**record, "positions": 64 * n, "loss": loss} for n, loss in enumerate([0.0, 4.5, 4.25, 0.0], start=1)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    section = teacher_section(read_run(found.workspace))
    captions = [block.caption for block in section.blocks if isinstance(block, Figure)]
    assert "the last is 4.250 nats" in captions[0]
    assert found.teacher.is_finished
