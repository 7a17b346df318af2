"""Sweeps that cannot be right are refused before anything is trained; those that are shipped can; the ledger adds up."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ENVIRONMENT, ROOT, make_spec, tristill
from tristill.pipeline.errors import ConfigError, MissingInputError, PipelineError
from tristill.pipeline.sweep.check import _problems_of_metric, check_sweep
from tristill.pipeline.sweep.config import Grid, Range, SweepConfig, load_sweep
from tristill.pipeline.sweep.ledger import balance, ledger_text
from tristill.pipeline.sweep.points import folder_name, grid, in_words, short_keys
from tristill.pipeline.sweep.student import Base
from tristill.pipeline.sweep.study import open_study
from tristill.stages.evaluate.metrics import ValidationMetrics

SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.toml"))
TEST = ROOT / "configs" / "sweeps" / "test.toml"


def check(run_dir: Path, *changes: str, path: Path = TEST) -> None:
    sweep, of_base = load_sweep(path, changes)
    check_sweep(sweep, Base(sweep, path, of_base, run_dir))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_lack_nothing_but_their_cache(path: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"run --until dump-logits --config configs/\w+.toml .*--run-dir"):
        check(tmp_path, path=path)


def test_a_missing_cache_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    outcome = tristill(
        "sweep", "--config", str(TEST), "--run-dir", str(tmp_path / "run"), "--set", "cache.max_train_windows=99"
    )
    assert outcome.code == 1
    assert f"the sweep needs the cache {tmp_path / 'run' / 'cache'}, which is missing or unfinished" in outcome.stderr
    assert (
        f"--set cache.max_train_windows=99 --run-dir {tmp_path / 'run'}` first, or add --make-cache" in outcome.stderr
    )
    assert not (tmp_path / "run").exists(), "nothing is left by what was refused"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("metrik=validation.perplexity", None),
        ("metric=loss", r"metric: Input should be 'validation.perplexity'.*; found 'loss'"),
        ("vary.distill.alpha=[]", r"vary.distill.alpha: Tuple should have at least 1 item"),
        ("vary.distill.alpha=0.3", r"vary.distill.alpha: Input should be a valid tuple; found 0.3"),
        ("vary.distill.alpha={low=0.1, hihg=0.3}", r"alpha.hihg: unknown key; did you mean 'high'\?"),
        ("vary.distill.alpha={low=0.3, high=0.1, step=0.1}", r"expected low below high, found 0.3 and 0.1"),
        ("vary.distill.alpha={low=0.0, high=0.1, log=true}", r"log needs a low above zero and no step"),
        ("vary.student.model.layers={low=1, high=2.5, kind='int'}", r"kind = 'int' needs whole numbers"),
        ("search={kind='tpe'}", r"search.trials: is missing; it has no default"),
        ("search={trials=3}", r"search.kind: is missing"),
        ("search={kind='tpee', trials=3}", r"search: Input tag 'tpee' found"),
        ("seeds=[1, 1]", r"seeds: expected seeds that differ; found \[1, 1\]"),
        ("pruning={kind='median', every=0}", r"pruning.every: Input should be greater than or equal to 1; found 0"),
        ("vary.distill.alpha={low=0.1, high=0.3}", r"vary.distill.alpha: found a range without a step.*; a grid needs"),
        ("vary.teacher.training.steps=[3]", r"vary.teacher.training.steps: expected a key of distill, evaluate, student"),
        ("vary.distill.targets=['online']", r"vary.distill.targets: a sweep reads its cache"),
        ("vary.distill.training.seed=[1]", r"vary.distill.training.seed: is varied by seeds already"),
        ("vary.distill.alpha={low=0.1, range=0.3}", r"alpha.range: unknown key"),
        ("distill.alhpa=0.3", r"distill.alhpa: unknown key; did you mean 'alpha'\?"),
    ],
)  # fmt: skip
def test_one_bad_setting_is_refused_by_its_path(finished_run: Path, change: str, message: str | None) -> None:
    with pytest.raises(ConfigError, match=message or "metrik: unknown key"):
        check(finished_run, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vary.distill.alpha=[0.2, 1.5]", r"  distill.alpha: .*less than or equal to 1; found 1.5 \(with alpha 1.5"),
        ("vary.distill.alhpa=[0.2]", r"  distill.alhpa: unknown key; did you mean 'alpha'\?"),
        ("vary.student.model.heads=[2, 3]", r"width \(32\) must be an even multiple of heads \(3\)"),
        ("vary.student.model.layers={low=1, high=2}", None),
        ("vary={'distill.alpha.x'=[0.2]}", r"  vary.distill.alpha.x: alpha is a value, not a table"),
        ("vary.distill.hidden.layers=[{1=1}, {1=3}]", r"  distill: .*cache does not serve it: hidden states of layers \[3\]"),
        ("pruning={kind='median', every=12}", r"  pruning.every: found 12, expected fewer than the 12 steps"),
        ("metric=validation.top1_agreement", None),
    ],
)  # fmt: skip
def test_every_value_is_tried_before_anything_is_trained(finished_run: Path, change: str, message: str | None) -> None:
    if message is None and "metric" in change:
        check(finished_run, change)
        return
    changes = (change, "search={kind='random', trials=2}") if "low" in change else (change,)
    with pytest.raises(ConfigError, match=message or r"student.model.layers: Input should be a valid integer.*1.618"):
        check(finished_run, *changes)


def test_all_problems_of_all_points_are_told_at_once(finished_run: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check(
            finished_run,
            "vary.distill.alpha=[2, 3]",
            "vary.distill.temperature=[-1.0]",
            "vary.student.init=['teecher']",
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{TEST}: 4 problems:"
    paths = [line.split(":")[0].strip() for line in lines[1:]]
    assert sorted(paths) == ["distill.alpha", "distill.alpha", "distill.temperature", "student.init"]


def test_a_cache_of_draws_knows_no_agreement() -> None:
    sampled = make_spec(profile={"kind": "sampled", "draws": 5, "temperature": 1.0}, tables_fingerprint="d" * 64)
    sweep, _ = load_sweep(TEST, ("metric=validation.acceptance_rate",))
    assert ["profile sampled" in problem for problem in _problems_of_metric(sweep, sampled)] == [True]


def test_keys_may_be_tables_or_dotted_and_a_grid_is_their_product() -> None:
    text = {
        "base": "x.toml",
        "vary": {
            "distill": {"alpha": [0.1, 0.2]},
            "student.model.layers": {"low": 1, "high": 5, "step": 2, "kind": "int"},
        },
    }
    sweep = SweepConfig.model_validate(text)
    assert list(grid(sweep)) == [
        {"distill.alpha": alpha, "student.model.layers": layers} for alpha in (0.1, 0.2) for layers in (1, 3, 5)
    ]
    assert isinstance(sweep.search, Grid)
    assert Range(low=0.1, high=0.7, step=0.2).values() == [0.1, 0.3, 0.5, 0.7]
    assert Range(low=1, high=4, kind="int").values() == [1, 2, 3, 4]


def test_points_have_short_names_that_tell_them_apart() -> None:
    keys = ["student.quantize.weights", "distill.training.steps", "student.quantize.warmup.steps"]
    assert list(short_keys(keys).values()) == ["weights", "training.steps", "warmup.steps"]
    assert in_words({"distill.alpha": 0.25, "student.init": "random", "x.y": [1]}) == "alpha 0.25, init random, y [1]"
    assert folder_name({"a": 1, "b": 2}) == folder_name({"b": 2, "a": 1}) != folder_name({"a": 1, "b": 3})


def test_every_metric_is_one_of_the_evaluation_and_knows_what_is_better() -> None:
    metrics = SweepConfig.model_fields["metric"].annotation.__args__  # type: ignore[union-attr]
    assert {metric.removeprefix("validation.") for metric in metrics} <= set(ValidationMetrics.model_fields)
    text = {"base": "x.toml", "vary": {"distill.alpha": [0.1]}}
    better = {m for m in metrics if SweepConfig.model_validate({**text, "metric": m}).direction == "maximize"}
    assert better == {"validation.top1_agreement", "validation.acceptance_rate"}


def test_a_storage_that_cannot_be_opened_is_refused_without_its_password(tmp_path: Path) -> None:
    for storage in ("nosuch://me:secret@host/db", "sqlite:///x.db?timeout=5&password=secret"):
        with pytest.raises(ConfigError, match=r"storage: .* write \$NAME for a variable of the environment") as caught:
            load_sweep(TEST, (f"storage={storage}",))
        assert "secret" not in str(caught.value)
    sweep, _ = load_sweep(TEST, ("storage=nosuch://me:$HOME@host/db",))
    with (
        pytest.raises(PipelineError, match="storage: host/db: cannot be opened") as caught,
        open_study(sweep, "test", tmp_path, {}, take_over=False),
    ):
        pass
    assert "/root" not in str(caught.value).replace(str(tmp_path), "")


def test_without_optuna_the_extra_is_named() -> None:
    start = "import sys; sys.modules['optuna'] = None; sys.argv = ['tristill', 'sweep']; "
    done = subprocess.run(
        [sys.executable, "-c", start + "from tristill.pipeline.__main__ import main; main()"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: a sweep needs the package optuna, which is not installed; pip install -e '.[sweep]'\n"
    )


def test_the_ledger_is_what_a_hand_computes() -> None:
    """Steps of 100 positions; online 1.5, 2 and 4 times a cached step, by 1, 2 and 3 s; students of 10 and 30 steps."""
    found = balance(
        teacher_s=50.0,
        dump_s=20.0,
        cache_bytes=3_000_000,
        steps=[(2.0, 3.0), (2.0, 4.0), (1.0, 4.0)],
        step_positions=100,
        trained=[(25.0, 1000), (65.0, 3000)],
    )
    assert (found.cached_step_s, found.online_step_s) == (2.0, 4.0)
    assert found.online_over_cached == (2.0, 1.5, 4.0)
    assert (found.num_students, found.students_s) == (2, 90.0)
    assert found.offline_total_s == 110.0
    assert found.online_total_s == 90.0 + 2.0 * 40
    assert found.break_even_students == 20.0 / (2.0 * 20)
    text = ledger_text(found)
    assert "50 s to train" in text
    assert "2.00 times as long (1.50 to 4.00; 2,000 and 4,000 ms)" in text
    assert "170 s: 60 s more. The cache pays from 0.5 students" in text
    dearer = balance(
        teacher_s=None, dump_s=20.0, cache_bytes=1, steps=[(2.0, 1.0)], step_positions=1, trained=[(1.0, 1)]
    )
    assert dearer.break_even_students is None
    assert "pays at no number of students" in ledger_text(dearer)
