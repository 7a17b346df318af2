"""What a sweep makes of its trials: which is best, what is written, and what the ledger says of teacher and dump."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from small_sweep import LEDGER

from conftest import ROOT
from tristill.pipeline.config import load_config
from tristill.pipeline.sweep.config import SweepConfig
from tristill.pipeline.sweep.ledger import _steps_of_teacher, ledger_text
from tristill.pipeline.sweep.points import folder_name
from tristill.pipeline.sweep.records import results_csv, results_of, results_text
from tristill.pipeline.sweep.results import SweepResults
from tristill.pipeline.workspace import Workspace

SEED = "distill.training.seed"


def trial(number: int, alpha: float, seed: int, value: float | None, **looks: Any) -> FrozenTrial:
    """One that is pruned if it has no value."""
    metrics = {"perplexity": value, "top1_agreement": value, "calibration": [{"count": 3}]}
    made = create_trial(
        state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
        value=value,
        intermediate_values=looks.get("looks", {}),
        user_attrs={"parameters": {"distill.alpha": alpha, SEED: seed}, "elapsed_s": 1.0}
        | ({} if value is None else {"summary": {"validation": metrics, "model": {"packed_bytes": 1}}}),
    )
    made.number = number
    return made


def results(trials: list[FrozenTrial], **settings: Any) -> SweepResults:
    sweep = SweepConfig.model_validate(
        {"base": "x.toml", "vary": {"distill.alpha": [0.1, 0.2]}, "seeds": [0, 1, 2], **settings}
    )
    return results_of("test", sweep, trials, Path("runs/x/sweeps/test"), "c" * 64)


def test_a_point_whose_bad_seeds_were_ended_does_not_win_by_those_that_are_left() -> None:
    survivors = [trial(0, 0.1, 0, 5.0), trial(1, 0.1, 1, None), trial(2, 0.1, 2, None)]
    whole = [trial(3, 0.2, 0, 7.0), trial(4, 0.2, 1, 6.0), trial(5, 0.2, 2, 8.0)]
    found = results(survivors + whole)
    assert found.best == 4
    assert [(group.mean, group.seeds_text) for group in found.groups] == [(5.0, "1 of 3"), (7.0, "3")]
    table = results_text(found, Path("runs/x")).split("\n\n")[1].splitlines()
    assert [line.split()[1] for line in table[-2:]] == ["0.2", "0.1"], "the best first"
    assert "| 1 of 3" in " ".join(table[-1].split())
    highest = results(survivors + whole, metric="validation.top1_agreement")
    assert highest.best == 5
    assert results(survivors).best == 0, "if there is no other"


def test_the_best_student_is_named_by_a_path_at_which_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Workspace(load_config(ROOT / "configs" / "test.toml"), Path("runs/x"))
    folder = Path("runs/x/sweeps/test/students") / folder_name({"distill.alpha": 0.1, SEED: 0})
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    found = results([trial(0, 0.1, 0, 5.0)])
    named = results_text(found, run.run_dir).split("best: ")[1].splitlines()[0].rpartition(" ")[2]
    assert named == str(folder)
    assert run.model_folder(named) == folder
    assert run.model_folder(str(found.trials[0].folder)) == folder, "as results.json names it, within the run's folder"


def test_a_seed_that_is_not_trained_yet_or_is_of_a_larger_sweep_before_counts_as_one_of_the_point() -> None:
    assert results([trial(0, 0.1, 0, 5.0)]).groups[0].seeds_text == "1 of 3"
    more = [trial(0, 0.1, 0, 5.0), trial(1, 0.1, 7, None)]
    assert results(more, seeds=[0]).groups[0].seeds_text == "1 of 2"
    assert results([trial(0, 0.1, 0, 5.0)], seeds=[]).groups[0].is_whole


def test_results_with_looks_that_are_not_finite_can_be_read_back() -> None:
    looks = {5: 3.5, 10: math.nan, 15: math.inf}
    found = results([trial(0, 0.1, 0, None, looks=looks)])
    assert found.trials[0].looks == ((5, 3.5), (10, None), (15, None))
    assert SweepResults.model_validate_json(found.model_dump_json()) == found


def test_a_csv_has_numbers_and_no_lists() -> None:
    rows = list(csv.DictReader(results_csv(results([trial(0, 0.1, 0, 5.0), trial(1, 0.1, 1, None)])).splitlines()))
    assert rows[0]["validation.top1_agreement"] == "5.0"
    assert "validation.calibration" not in rows[0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "ledger: the teacher took 160 s to train, which is paid either way. Its cache took 72 s to dump"),
        ({"at_least": ("teacher_s",)}, "the teacher took at least 160 s to train, which is paid either way. Its cache took 72"),
        ({"at_least": ("dump_s",)}, "the teacher took 160 s to train, which is paid either way. Its cache took at least 72"),
        ({"teacher_s": None}, "ledger: the teacher took no time that is known. Its cache"),
        ({"teacher_s": None, "is_teacher_given": True}, "ledger: the teacher was given. Its cache"),
        ({"teacher_s": None, "is_teacher_given": True, "num_other_teachers": 2},
         "the teacher was given (not counted: 2 more of its ensemble). Its cache"),
        ({"teacher_steps": ("teacher", "dump-logits --name a", "distill --name a")},
         "took 160 s to train (teacher, dump-logits --name a, distill --name a), which is paid either way. Its"),
        ({"teacher_steps": ("distill --name a",), "is_teacher_given": True},
         "took 160 s to train (distill --name a; the first one was given), which is paid"),
    ],
)  # fmt: skip
def test_the_ledger_says_what_it_counts_of_the_teacher(changes: dict[str, Any], text: str) -> None:
    assert text in ledger_text(LEDGER.model_copy(update=changes))


def test_in_a_chain_every_step_before_the_last_dump_made_the_teacher(tmp_path: Path) -> None:
    path = ROOT / "configs" / "test.toml"
    alone = Workspace(load_config(path), tmp_path)
    assert [step.label for step in _steps_of_teacher(alone)] == ["teacher"]
    chain = Workspace(load_config(path, ("stages.a={}", "stages.b={}")), tmp_path)
    assert [step.label for step in _steps_of_teacher(chain)] == [
        "teacher", "dump-logits --name a", "distill --name a", "dump-logits --name b", "distill --name b",
    ]  # fmt: skip
