"""Tables of students: every row is a config that trains, and what is measured stays where it was."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import methods, recipe
from benchmarks.students import StudentTable, collect, config_of, slug_of, student_folder
from conftest import ROOT
from tristill.pipeline.config import load_config

TABLES = [methods.TABLE, recipe.TABLE]
DEMO = ROOT / "configs" / "demo.toml"


def arguments(run_dir: Path = Path("runs/demo"), budget: int = 1) -> argparse.Namespace:
    return argparse.Namespace(config=DEMO, run_dir=run_dir, budget=budget, results=run_dir / "results.json")


@pytest.mark.parametrize("budget", [1, 4])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_row_is_a_valid_config_and_no_two_rows_are_one(table: StudentTable, budget: int) -> None:
    configs = [config_of(table, arguments(budget=budget), row, 2) for row in table.rows]
    demo = load_config(DEMO)
    assert {config.distill.training.steps for config in configs} == {budget * demo.distill.training.steps}
    assert {config.distill.training.seed for config in configs} == {2}
    assert {config.cache.max_train_windows for config in configs} == {budget * 2400}
    assert len({config.model_dump_json() for config in configs}) == len(table.rows)
    assert len({slug_of(row) for row in table.rows}) == len(table.rows)


def test_the_first_recipe_is_the_demo_itself_and_others_change_what_they_name() -> None:
    found = {row: config_of(recipe.TABLE, arguments(), row, 0) for row in recipe.TABLE.rows}
    demo = load_config(DEMO)
    assert found["the demo's"].student == demo.student
    assert found["the demo's"].distill.numbers() == demo.distill.numbers()
    assert found["learning rate x4"].distill.training.learning_rate == 4 * demo.distill.training.learning_rate
    both = found["two phases, decay off, learning rate x2"].distill.training
    assert both.second_phase is not None
    assert (both.schedule, both.second_phase_step, both.decayed_steps, both.learning_rate) == ("linear", 150, 150, 4e-3)
    assert found["SubLN"].student_shape == demo.student_shape.model_copy(update={"subln": True})


def test_students_and_caches_of_a_measurement_stay_where_they_were() -> None:
    run_dir = Path("runs/demo")
    folder = student_folder(methods.TABLE, arguments(), "forward KL, tau 1", 2)
    assert folder == run_dir / "method-students" / "forward-KL--tau-1-1-2"
    assert methods.TABLE.cache_of(run_dir, "hidden states, MSE", 4) == run_dir / "method-caches" / "hidden-4"
    assert recipe.TABLE.cache_of(run_dir, "SubLN", 1) == run_dir / "cache"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_table_is_that_of_the_students_that_are_there(table: StudentTable, tmp_path: Path) -> None:
    if not table.results.is_file():
        pytest.skip("not measured yet")
    measured = json.loads(table.results.read_text(encoding="utf-8"))
    for budget, rows in measured["results"].items():
        for row, seeds in rows.items():
            for seed, metrics in seeds.items():
                folder = student_folder(table, arguments(tmp_path, budget), row, seed)
                folder.mkdir(parents=True)
                (folder / "exact.json").write_text(json.dumps(metrics))
    assert collect(table, arguments(tmp_path)) == measured["markdown"]
    again = json.loads((tmp_path / "results.json").read_text())
    assert (again["results"], again["markdown"]) == (measured["results"], measured["markdown"])
