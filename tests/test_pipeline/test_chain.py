"""Any checkpoint can be a teacher, and a config of stages is a chain of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_run import small_config
from tokenizers import Tokenizer
from tokenizers.models import BPE

from conftest import ROOT, Outcome, tristill
from tristill.cache import open_cache
from tristill.pipeline.config import Config, load_config, save_config
from tristill.pipeline.errors import ConfigError
from tristill.stages.errors import CheckpointError
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.origin import model_fingerprint

CONFIG = ("--config", "configs/test.toml")
FAST = small_config('{ kind = "topk", temperatures = [1.0] }')
STAGES = """
[stages.assistant]
student.model = { width = 24, layers = 2, heads = 2, mlp_width = 32 }
student.quantize = { weights = "none", activations = "none" }
distill.training.steps = 9

[stages.small]
student.model = { width = 16, layers = 1, heads = 2, mlp_width = 32 }
cache.profile = { kind = "dense" }  # instead of all that is said of another kind
distill.alpha = 0.25
"""
UNTAUGHT = """
[variants.untaught]
distill.alpha = 1.0
"""


def on(run_dir: Path, *arguments: str, config: tuple[str, ...] = CONFIG) -> Outcome:
    return tristill(*arguments, *config, "--run-dir", str(run_dir))


def record(folder: Path) -> dict[str, dict[str, str]]:
    return json.loads((folder / "provenance.json").read_text())


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chain.toml and the run that one command makes of it. Tests must not change it."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "chain.toml").write_text(FAST + STAGES + UNTAUGHT)
    outcome = on(folder / "run", "run", config=("--config", str(folder / "chain.toml")))
    assert outcome.code == 0, outcome.stderr
    (folder / "stdout.txt").write_text(outcome.stdout)
    return folder


@pytest.fixture
def own_chain(chain: Path, tmp_path: Path) -> Path:
    shutil.copytree(chain, tmp_path / "chain", dirs_exist_ok=True)
    return tmp_path / "chain"


def on_chain(folder: Path, *arguments: str) -> Outcome:
    return on(folder / "run", *arguments, config=("--config", str(folder / "chain.toml")))


# A teacher that is given


@pytest.fixture
def given(finished_run: Path, tmp_path: Path) -> tuple[str, ...]:
    """A config whose teacher is a copy of the test run's ternary student, and a run folder with its tokens."""
    shutil.copytree(finished_run / "students" / "student", tmp_path / "given")
    shutil.copytree(finished_run / "data", tmp_path / "run" / "data")
    config = load_config(ROOT / "configs" / "test.toml")
    teacher = config.teacher.model_copy(update={"path": tmp_path / "given", "model": None, "training": None})
    save_config(config.model_copy(update={"teacher": teacher, "variants": {}}), tmp_path / "given.toml")
    return ("--config", str(tmp_path / "given.toml"))


def test_a_ternary_student_is_a_teacher_whose_cache_says_what_it_says(given: tuple[str, ...], tmp_path: Path) -> None:
    profile = "cache.profile={kind='plain_topk', top_k=512, temperature=1.0, logit_dtype='float32'}"
    everything = ("--set", profile, "--set", "cache.hidden_layers=[]")
    outcome = on(tmp_path / "run", "teacher", config=given)
    assert outcome.code == 0, outcome.stderr
    assert on(tmp_path / "run", "dump-logits", *everything, config=given).code == 0
    student = load_model(tmp_path / "given")
    assert student.quantize is not None
    assert student.quantize.is_ternary
    cache = open_cache(tmp_path / "run" / "cache")
    assert cache.spec.teacher_fingerprint == model_fingerprint(tmp_path / "given")
    batch = next(iter(cache.stream("validation", 16, seed=None)))
    head_ids = torch.from_numpy(batch.target["head_ids"].astype("int64"))
    stored = torch.from_numpy(batch.target["head_logits"]).float()
    ids = torch.from_numpy(batch.input_ids.astype("int64"))
    with torch.no_grad():
        logits = student.eval().logits(ids[:, :-1])
    expected = (logits - logits.amax(-1, keepdim=True)).gather(-1, head_ids)
    # Another order of sums may move an activation over the edge of its 8 bits, here and there.
    assert float(((stored - expected).abs() < 1e-4).float().mean()) > 0.999
    assert torch.allclose(stored, expected, atol=0.1)


def test_a_given_teacher_is_taken_as_it_is_and_trained_by_nobody(
    given: tuple[str, ...], finished_run: Path, tmp_path: Path
) -> None:
    outcome = on(tmp_path / "run", "run", config=given)
    assert outcome.code == 0, outcome.stderr
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "run" / "teacher" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()
    summary = json.loads((tmp_path / "run" / "teacher" / "summary.json").read_text())
    assert summary["train"] is None
    own = json.loads((finished_run / "students" / "student" / "summary.json").read_text())
    assert summary["validation"]["loss_nats"] == pytest.approx(own["validation"]["loss_nats"])
    assert summary["fingerprint"] == own["fingerprints"]["student"]
    assert record(tmp_path / "run" / "students" / "student")["inputs"]["teacher"] == summary["fingerprint"]
    assert "| teacher | -              |" in outcome.stdout
    # Where it came from may go, or be elsewhere: its content is what counts.
    (tmp_path / "given").rename(tmp_path / "moved")
    assert on(tmp_path / "run", "run", "--dry-run", config=given).stdout == "nothing to do\n"
    moved = ("--set", f"teacher.path={tmp_path / 'moved'}")
    assert on(tmp_path / "run", "run", "--dry-run", *moved, config=given).stdout == "nothing to do\n"


def test_a_given_teacher_that_changed_is_noticed(given: tuple[str, ...], finished_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert on(run_dir, "teacher", config=given).code == 0
    weights = finished_run / "students" / "no-teacher" / "model.safetensors"
    shutil.copyfile(weights, tmp_path / "given" / "model.safetensors")
    outcome = on(run_dir, "dump-logits", config=given)
    assert outcome.code == 1
    assert "input checkpoint: was " in outcome.stderr
    assert "`tristill teacher --force`" in outcome.stderr
    assert on(run_dir, "teacher", "--force", config=given).code == 0
    assert (run_dir / "teacher" / "model.safetensors").read_bytes() == weights.read_bytes()


def test_a_given_teacher_of_another_tokenizer_is_refused_with_the_way_out(
    given: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = tmp_path / "fresh"
    other = ("--set", "data.tokenizer.train_bytes=100_000")
    assert on(run_dir, "tokenize", *other, config=given).code == 0
    outcome = on(run_dir, "teacher", *other, config=given)
    assert outcome.code == 1
    assert "tokenizer.json: the tokenizer of the teacher is not that of" in outcome.stderr
    assert "set data.tokenizer to { kind = 'file', path = '" in outcome.stderr
    assert not (run_dir / "teacher" / "model.safetensors").exists()
    way_out = ("--set", f"data.tokenizer={{ kind = 'file', path = '{tmp_path / 'given' / 'tokenizer.json'}' }}")
    assert on(run_dir, "tokenize", *way_out, "--force", config=given).code == 0
    assert on(run_dir, "teacher", *way_out, config=given).code == 0


def test_a_tokenizer_that_cannot_be_the_given_teachers_is_refused_before_it_is_made(
    given: tuple[str, ...], tmp_path: Path
) -> None:
    outcome = on(tmp_path / "fresh", "run", "--set", "data.tokenizer.vocab_size=511", config=given)
    own = f"{{ kind = 'file', path = '{tmp_path / 'given'}' }}"
    assert outcome.code == 1
    assert f"the 512 ids of its own tokenizer; set data.tokenizer to {own}" in outcome.stderr
    assert not (tmp_path / "fresh").exists()
    (tmp_path / "other.json").write_text(Tokenizer(BPE({"<|endoftext|>": 0, "a": 1}, [])).to_str())
    other = ("--set", f"data.tokenizer={{ kind = 'file', path = '{tmp_path / 'other.json'}' }}")
    outcome = on(tmp_path / "fresh", "tokenize", *other, config=given)
    assert outcome.code == 1
    assert f"the tokenizer of the teacher is not that of {tmp_path / 'other.json'}: 511 of 512 ids" in outcome.stderr
    assert f"set data.tokenizer to {own}" in outcome.stderr


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", "config.json: found no model there; train it first, or give another folder"),
        ("model.safetensors", "given: found 0 bytes of weights, but "),
        ("tokenizer.json", "tokenizer.json: is missing; the ids that a model knows are those of its own tokenizer"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(given: tuple[str, ...], tmp_path: Path, lost: str, message: str) -> None:
    (tmp_path / "given" / lost).unlink()
    outcome = on(tmp_path / "run", "teacher", config=given)
    assert outcome.code == 1
    assert message in outcome.stderr


def test_a_given_teacher_inside_the_run_folder_is_refused_before_a_step_replaces_it(copied_run: Path) -> None:
    config = load_config(ROOT / "configs" / "test.toml")
    inside = copied_run / "teacher"
    teacher = config.teacher.model_copy(update={"path": inside, "model": None, "training": None})
    save_config(config.model_copy(update={"teacher": teacher}), copied_run / "inside.toml")
    before = (inside / "model.safetensors").read_bytes()
    outcome = on(copied_run, "teacher", "--force", config=("--config", str(copied_run / "inside.toml")))
    assert outcome.code == 2
    assert "which is in the run folder" in outcome.stderr
    assert (inside / "model.safetensors").read_bytes() == before


def test_a_student_takes_the_shape_of_a_given_teacher(given: tuple[str, ...], tmp_path: Path) -> None:
    config = load_config(Path(given[1]))
    shape = load_model(tmp_path / "given").config
    assert config.student_shape == shape
    shutil.rmtree(tmp_path / "given")
    with pytest.raises(CheckpointError, match="found no model there; train it first, or give another folder"):
        _ = config.student_shape


# The config of a chain


def config_of(tmp_path: Path, text: str, *assignments: str) -> Config:
    path = tmp_path / "some.toml"
    path.write_text(text)
    return load_config(path, assignments)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("teacher={ path = 'x', model = { width = 8, layers = 1, heads = 1, mlp_width = 8 } }", "found path and model"),
        ("teacher={ model = { width = 8, layers = 1, heads = 1, mlp_width = 8 } }", "found model"),
        ("teacher={}", "found none of them"),
        (
            "stages.student.distill.alpha=1",
            r"stages.student: expected another name: .*none of \['assistant', .*'student', 'teacher'\]",
        ),
        ("stages.untaught.distill.alpha=1", r"variants.untaught: expected another name: .*'untaught'"),
        ("stages.teacher.distill.alpha=1", "stages.teacher: expected another name"),
        ("stages.a b.distill.alpha=1", "stages.a b: expected another name"),
        ("stages.small.teacher.path=x", r"stages.small: expected tables \['cache', 'distill', 'evaluate', 'student'\]"),
        ("stages.small.distill.alpha=2", "stages.small.distill.alpha: Input should be less than or equal to 1"),
        ("stages.small.distill.alhpa=1", "stages.small.distill.alhpa: unknown key; did you mean 'alpha'"),
        ("stages=3", "stages: Input should be a valid dictionary"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_by_its_path(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, FAST + STAGES + UNTAUGHT, assignment)


def test_two_links_with_one_cache_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cache.dir: found the folder of stages.small.cache.dir; expected one of its"
    ):
        config_of(tmp_path, FAST + STAGES, "cache.dir=here", "stages.small.cache.dir=here")


def test_a_stage_is_the_config_with_its_changes_and_the_shape_comes_down_the_chain(tmp_path: Path) -> None:
    config = config_of(tmp_path, FAST + STAGES + UNTAUGHT, "cache.dir=shared")
    assistant, small, student = (config.for_student(name) for name in config.link_names)
    assert (assistant.distill.training.steps, small.distill.training.steps, student.distill.training.steps) == (9, 6, 6)
    assert (assistant.cache.profile.kind, small.cache.profile.kind) == ("topk", "dense")
    assert (assistant.cache.dir, small.cache.dir, student.cache.dir) == (None, None, Path("shared"))
    assert not assistant.student.quantize.is_ternary
    assert student.student.quantize.is_ternary
    assert student.student.model == config.for_student("untaught").student.model == small.student.model
    assert config.student_shape.width == 16
    assert [config.teacher_of(name) for name in ("assistant", "small", "student", "untaught", "new")] == [
        None, "assistant", "small", "small", "small",
    ]  # fmt: skip


# A chain, run


def test_one_command_makes_every_link_from_the_student_of_the_link_before(chain: Path) -> None:
    run_dir = chain / "run"
    teachers = {"assistant": "teacher", "small": "students/assistant", "student": "students/small"}
    for name, teacher in teachers.items():
        folder = run_dir / ("cache" if name == "student" else f"caches/{name}")
        fingerprint = model_fingerprint(run_dir / teacher)
        assert open_cache(folder).spec.teacher_fingerprint == fingerprint
        assert record(folder)["inputs"]["teacher"] == fingerprint
        assert record(run_dir / "students" / name)["inputs"]["teacher"] == fingerprint
    assert record(run_dir / "students" / "untaught")["inputs"] == record(run_dir / "students" / "student")["inputs"]
    assert sorted(path.name for path in (run_dir / "caches").iterdir()) == ["assistant", "small"]


def test_the_table_of_a_chain_says_who_taught_whom(chain: Path) -> None:
    lines = (chain / "stdout.txt").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if line.startswith("| ")]
    assert cells == [
        ["model", "taught by"], ["teacher", "-"], ["assistant", "teacher"], ["small", "assistant"],
        ["student", "small"], ["untaught", "small"],
    ]  # fmt: skip
    assert [line.split(":")[0] for line in lines[-3:]] == ["cache of assistant", "cache of small", "cache"]


def test_evaluate_judges_each_student_by_its_own_teacher(own_chain: Path) -> None:
    metrics = json.loads(on_chain(own_chain, "evaluate", "--json").stdout)
    assert list(metrics) == ["teacher", "assistant", "small", "student", "untaught"]
    for name in ("assistant", "small", "student"):
        summary = json.loads((own_chain / "run" / "students" / name / "summary.json").read_text())
        assert metrics[name] == summary["validation"] | {"basis": summary["basis"]}
    assert metrics["teacher"]["kl_to_teacher_nats"] == pytest.approx(0, abs=2e-3)


def test_a_finished_chain_is_skipped_and_what_is_lost_of_it_is_made_again(own_chain: Path) -> None:
    assert on_chain(own_chain, "run", "--dry-run").stdout == "nothing to do\n"
    run_dir = own_chain / "run"
    made = record(run_dir / "students" / "student")["fingerprint"]
    for lost in ("cache", "caches/small", "students/small", "students/student"):
        shutil.rmtree(run_dir / lost)
    planned = on_chain(own_chain, "run", "--dry-run").stdout.splitlines()
    assert planned == ["dump-logits --name small", "distill --name small", "dump-logits", "distill --name student"]
    outcome = on_chain(own_chain, "dump-logits")
    assert outcome.code == 1
    assert "students/small, which is missing or unfinished; run `tristill distill --name small` first" in outcome.stderr
    for command in (("dump-logits", "--name", "small"), ("distill", "--name", "small"), ("run",)):
        assert on_chain(own_chain, *command).code == 0
    assert record(run_dir / "students" / "student")["fingerprint"] == made


def test_each_link_is_the_run_that_a_given_teacher_makes(chain: Path, tmp_path: Path) -> None:
    plain = load_config(chain / "chain.toml").for_student("small")
    given = plain.teacher.model_copy(
        update={"path": chain / "run" / "students" / "assistant", "model": None, "training": None}
    )
    save_config(plain.model_copy(update={"teacher": given}), tmp_path / "link.toml")
    shutil.copytree(chain / "run" / "data", tmp_path / "run" / "data")
    outcome = on(tmp_path / "run", "run", config=("--config", str(tmp_path / "link.toml")))
    assert outcome.code == 0, outcome.stderr
    for alone, linked in (("students/student", "students/small"), ("cache", "caches/small")):
        assert record(tmp_path / "run" / alone)["fingerprint"] == record(chain / "run" / linked)["fingerprint"]


def test_changed_settings_of_a_stage_are_refused_and_go_down_the_chain(own_chain: Path) -> None:
    change = ("--set", "stages.assistant.distill.alpha=0.75")
    outcome = on_chain(own_chain, "run", *change)
    assert outcome.code == 1
    assert "students/assistant: was made with other settings or inputs:" in outcome.stderr
    assert "distill.alpha: was 0.5, is 0.75" in outcome.stderr
    assert "`tristill distill --name assistant --force`" in outcome.stderr
    assert on_chain(own_chain, "distill", "--name", "assistant", "--force", *change).code == 0
    outcome = on_chain(own_chain, "run", *change)
    assert outcome.code == 1
    assert "caches/small: was made with other settings or inputs:" in outcome.stderr
    assert "input teacher: was " in outcome.stderr
    assert "`tristill dump-logits --name small --force`" in outcome.stderr


def test_a_damaged_cache_of_a_stage_is_repaired_by_its_own_teacher(own_chain: Path) -> None:
    folder = own_chain / "run" / "caches" / "small"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "train-00000.h5").unlink()
    outcome = tristill("cache", "repair", str(folder))
    assert outcome.code == 0, outcome.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_only_links_have_caches(chain: Path) -> None:
    outcome = on_chain(chain, "dump-logits", "--name", "untaught")
    assert outcome.code == 2
    assert "--name untaught: found no stage of that name; expected one of: assistant, small, student" in outcome.stderr
