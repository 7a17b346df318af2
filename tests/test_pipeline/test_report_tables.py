"""What the report says of a run at its top, in its tables and on its axes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tristill.pipeline.cache_info import cache_info
from tristill.pipeline.cache_info_text import INFINITE_KL, cache_info_text
from tristill.pipeline.config import load_config
from tristill.pipeline.report.cache import fidelity_blocks
from tristill.pipeline.report.evaluation import evaluation_section
from tristill.pipeline.report.run import Run, read_run
from tristill.pipeline.report.section import Block, Figure, Section, Table
from tristill.pipeline.report.settings_scale import Scale, is_logarithmic
from tristill.pipeline.report.students import students_section
from tristill.pipeline.report.summary import about, tiles
from tristill.pipeline.report.teacher import teacher_section
from tristill.pipeline.workspace import Workspace


@pytest.fixture(scope="module")
def run(finished_run: Path) -> Run:
    return read_run(Workspace(load_config(finished_run / "config.toml"), finished_run))


def table_of(section: Section) -> dict[str, dict[str, str]]:
    """Cells of its first table by row and column."""
    table = next(block for block in section.blocks if isinstance(block, Table))
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def with_validation(run: Run, **metrics: object) -> Run:
    """With other metrics of all students."""
    students = tuple(
        replace(one, summary={**one.summary, "validation": {**one.validation, **metrics}}) for one in run.students
    )
    return replace(run, students=students)


def test_the_top_says_whose_run_it_is(run: Run, finished_run: Path) -> None:
    found = dict(about(run))
    record = json.loads((finished_run / "students" / "student" / "provenance.json").read_text())
    summary = json.loads((finished_run / "students" / "student" / "summary.json").read_text())
    assert found["Teacher"] == "trained in this run"
    assert record["machine"]["processor"] in found["Hardware"]
    assert f"{record['machine']['cores']} cores" in found["Hardware"]
    assert str(summary["train"]["threads"]) in found["Threads"].split("; ")
    assert found["tristill"].startswith(record["versions"]["tristill"])
    assert record["commit"] is None or f"commit {record['commit']}" in found["tristill"]
    assert found["Finished"] == max(
        json.loads(path.read_text())["finished_at"][:16].replace("T", " ") + " UTC"
        for path in [finished_run / "teacher" / "provenance.json", *finished_run.glob("students/*/provenance.json")]
    )
    given = load_config(finished_run / "config.toml", ('teacher.path="Qwen/Qwen3-0.6B"',))
    named = replace(run, workspace=Workspace(given, finished_run))
    assert dict(about(named))["Teacher"] == "Qwen/Qwen3-0.6B"


def test_draws_know_no_first_choice_and_the_card_claims_none(run: Run) -> None:
    notes = {tile.label: tile.note for tile in tiles(run)}
    assert "the same first choice at" in notes["KL to the teacher"]
    notes = {tile.label: tile.note for tile in tiles(with_validation(run, top1_agreement=None))}
    assert "first choice" not in notes["KL to the teacher"]


def test_settings_that_differ_between_students_are_columns_of_their_table(run: Run) -> None:
    cells = table_of(students_section(run))
    assert (cells["student"]["hidden.weight"], cells["no-teacher"]["hidden.weight"]) == ("0.1", "0")
    assert not {"training.learning_rate", "alpha"} & cells["student"].keys()
    alone = table_of(students_section(replace(run, students=run.students[:1])))
    assert "hidden.weight" not in alone["student"]


def test_means_have_their_standard_errors_and_say_over_what(run: Run) -> None:
    errors = {
        "unit": "document",
        "num_units": 24,
        "loss_nats": 0.01,
        "kl_to_teacher_nats": 0.002,
        "top1_agreement": 0.01,
    }
    known = with_validation(
        run, loss_nats=math.log(80), perplexity=80.0, bits_per_byte=2.0, kl_to_teacher_nats=0.5, top1_agreement=0.6,
        standard_errors=errors,
    )  # fmt: skip
    section = evaluation_section(known)
    cells = table_of(section)["student"]
    sign = "\N{PLUS-MINUS SIGN}"
    assert cells["perplexity"] == f"80.00 {sign} 0.80", "exp(x) moves by exp(x) dx"
    assert cells["bits/byte"] == f"2.0000 {sign} {2 * 0.01 / math.log(80):.4f}"
    assert cells["KL to teacher, nats"] == f"0.5000 {sign} 0.0020"
    assert cells["top-1 agreement"] == f"60.0% {sign} 1.0%"
    caption = next(block.caption for block in section.blocks if isinstance(block, Table))
    teacher = run.teacher.validation["standard_errors"]
    assert f"the standard error over {teacher['num_units']} {teacher['unit']}s" in caption


def test_held_out_losses_are_drawn_and_their_parting_is_told(run: Run) -> None:
    def log(held_out: list[float]) -> tuple[dict[str, Any], ...]:
        return tuple(
            {"step": 10 * n, "positions": 100.0 * n, "loss": 5.0 - n, "held_out": {"loss_nats": loss}}
            for n, loss in enumerate(held_out)
        )

    overfit = replace(run.teacher, log=log([4.0, 3.0, 3.3, 3.6]))
    known = replace(run, teacher=overfit, students=(replace(run.students[0], log=log([4.0, 3.0, 2.9, 2.8])),))
    (figure,) = (block for block in teacher_section(known).figures if block.key == "teacher-loss")
    assert "held-out sample" in [entry.label for entry in figure.legend]
    assert "teacher: held-out loss rises while training loss falls: 3.0000 nats at step 10" in figure.caption
    (figure,) = (block for block in students_section(known).figures if block.key == "students-held-out")
    assert "rises" not in figure.caption
    assert not [block for block in students_section(run).figures if block.key == "students-held-out"]


def test_an_infinite_kl_is_said_to_be_no_fault(finished_run: Path) -> None:
    info = cache_info(finished_run / "cache")
    assert INFINITE_KL not in cache_info_text(info)
    point = info["calibration"]["points"][info["calibration"]["chosen"] or 0]
    assert INFINITE_KL not in captions(fidelity_blocks(info["calibration"], ""))
    infinite = {**point, "kl_nats": dict.fromkeys(point["kl_nats"])}
    drawn = {**info, "calibration": {**info["calibration"], "points": [infinite], "chosen": 0}}
    assert INFINITE_KL in cache_info_text(drawn)
    assert INFINITE_KL in captions(fidelity_blocks(drawn["calibration"], ""))


def captions(blocks: list[Block]) -> str:
    return " ".join(block.caption for block in blocks if isinstance(block, Table | Figure))


@pytest.mark.parametrize(
    ("values", "is_log"),
    [
        ([0.1, 0.3, 0.5, 0.7], False),
        ([1, 2, 4, 8, 16], True),
        ([1e-4, 3e-4, 1e-3, 3e-3], True),
        ([0.00012, 0.0007, 0.0011, 0.004, 0.0091, 0.0003], True),
        ([0.0, 1.0, 10.0, 100.0], False),
        ([10, 20, 30, 40, 50], False),
    ],
)
def test_numbers_stand_by_size_on_the_axis_that_they_lie_evenly_on(values: list[float], is_log: bool) -> None:
    scale = Scale.of(values)
    assert is_logarithmic(values) == scale.is_log == is_log
    places = [scale.place(value) for value in sorted(values)]
    assert (places[0], places[-1]) == (0, pytest.approx(1))
    form = math.log if is_log else float
    low, high = form(min(values)), form(max(values))
    assert places == pytest.approx([(form(value) - low) / (high - low) for value in sorted(values)])


def test_many_numbers_have_round_ticks_and_names_are_in_order() -> None:
    scale = Scale.of([0.00012 * 1.37**n for n in range(14)])
    assert [text for _, text in scale.ticks][1:-1] == ["0.0002", "0.0005", "0.001", "0.002", "0.005"]
    names = [text for _, text in Scale.of([10, None, 2, 100]).ticks]
    assert names == ["-", "2", "10", "100"]
