"""`tristill export`: only a checked export gets its name, nothing of a user's is replaced, refusals say why."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from small_students import BPE, make_student, make_tokens

from conftest import ENVIRONMENT, ROOT, Outcome, tristill
from tristill.stages.models.checkpoint import load_model
from tristill.stages.quantize.config import QuantizeConfig

CONFIG = ("--config", "configs/test.toml")


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with tokens and a student whose rows fit ternary blocks. Tests must not change it."""
    run_dir = tmp_path_factory.mktemp("wide")
    make_tokens(run_dir / "data", BPE)
    make_student(run_dir / "students" / "student", run_dir / "data", QuantizeConfig(), steps=15)
    return run_dir


@pytest.fixture
def own_run(wide_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wide_run, tmp_path / "run"))


def on(run_dir: Path, *arguments: str) -> Outcome:
    return tristill("export", *arguments, *CONFIG, "--run-dir", str(run_dir))


def without(run_dir: Path, packages: tuple[str, ...], *arguments: str) -> Outcome:
    """The command on a machine that lacks these packages."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({packages!r})); "
        "from tristill.pipeline.__main__ import main; main()"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, "export", *arguments, *CONFIG, "--run-dir", str(run_dir)],
        cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return Outcome(done.returncode, done.stdout, done.stderr)


def hidden_files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def test_gguf_goes_to_its_place_with_a_record_and_a_second_export_replaces_it(own_run: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the extra `gguf` is not installed")
    exports = own_run / "exports" / "student"
    outcome = on(own_run, "--format", "gguf", "--type", "both")
    assert outcome.code == 0, outcome.stderr
    assert "gguf TQ1_0, computed by llama.cpp (xllamacpp " in outcome.stdout
    assert "| as trained" in outcome.stdout
    assert "its tokenizer made the same ids of 29 texts" in outcome.stdout
    names = {path.name for path in exports.iterdir()}
    assert names == {"student.gguf", "student.gguf.json", "student-TQ1_0.gguf", "student-TQ1_0.gguf.json"}
    record = json.loads((exports / "student.gguf.json").read_text())
    summary = json.loads((own_run / "students" / "student" / "summary.json").read_text())
    assert record["inputs"] == {"student": summary["fingerprints"]["student"]}
    assert record["verdict"]["to_reference"]["kl_nats"] < 1e-6
    before = (exports / "student.gguf").read_bytes()
    assert on(own_run, "--format", "gguf").code == 0
    assert (exports / "student.gguf").read_bytes() == before
    assert hidden_files(own_run) == []


def test_folders_are_replaced_whole_and_any_folder_of_a_model_can_be_named(own_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    model, out = str(own_run / "students" / "student"), tmp_path / "elsewhere" / "dense"
    for _ in range(2):
        outcome = on(own_run, model, "--format", "hf", "--out", str(out))
        assert outcome.code == 0, outcome.stderr
        assert f"{out}: " in outcome.stdout
        assert {path.name for path in out.iterdir()} == {
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip
        (out / "model.safetensors").write_bytes(b"")
    assert hidden_files(tmp_path) == []
    outcome = on(own_run, "--format", "bitnet")
    assert outcome.code == 0, outcome.stderr
    assert {path.name for path in (own_run / "exports" / "student").iterdir()} == {"bitnet", "bitnet.json"}


def test_a_dequantised_folder_is_a_model_that_can_be_evaluated(own_run: Path) -> None:
    assert on(own_run, "--format", "hf").code == 0
    folder = own_run / "exports" / "student" / "hf"
    assert load_model(folder).quantize is None
    outcome = tristill("evaluate", "student", str(folder), "--json", *CONFIG, "--run-dir", str(own_run))
    assert outcome.code == 0, outcome.stderr
    student, dense = json.loads(outcome.stdout).values()
    assert dense["loss_nats"] == pytest.approx(student["loss_nats"], rel=1e-3)


def test_what_no_export_wrote_is_not_replaced(own_run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_text("mine")
    outcome = on(own_run, "--format", "gguf", "--out", str(mine))
    assert outcome.code == 1
    assert "mine.gguf: found something that `tristill export --format gguf` did not write" in outcome.stderr
    assert mine.read_text() == "mine"
    (own_run / "exports" / "student" / "hf").mkdir(parents=True)
    outcome = on(own_run, "--format", "hf")
    assert outcome.code == 1
    assert "it leaves hf.json beside what it writes" in outcome.stderr


def test_files_of_the_user_beside_and_inside_an_export_stay(own_run: Path, tmp_path: Path) -> None:
    (tmp_path / "dense.json").write_text("mine")
    outcome = on(own_run, "--format", "hf", "--out", str(tmp_path / "dense"))
    assert outcome.code == 1
    assert "dense.json: found a file that is no record of an export" in outcome.stderr
    exports = own_run / "exports" / "student"
    assert on(own_run, "--format", "hf").code == 0
    mine = [exports / ".hf.partial", exports / ".hf.old", exports / "hf" / "README.md", exports / "notes.txt"]
    for path in mine:
        path.write_text("mine")
    (exports / "hf" / "config.json").write_text("{}")
    (exports / "hf" / "folder").mkdir()
    record = json.loads((exports / "hf.json").read_text())
    (exports / "hf.json").write_text(json.dumps({**record, "files": [*record["files"], "folder", "../notes.txt"]}))
    assert on(own_run, "--format", "hf").code == 0
    assert [path.read_text() for path in mine] == ["mine"] * 4
    assert json.loads((exports / "hf" / "config.json").read_text())["model_type"] == "llama"
    (own_run / "students" / "student" / "chat_template.jinja").write_text("{{ messages }}")
    (exports / "hf" / "chat_template.jinja").write_text("mine")
    outcome = on(own_run, "--format", "hf")
    assert outcome.code == 1
    assert "chat_template.jinja: found a file that no export wrote" in outcome.stderr
    assert (exports / "hf" / "chat_template.jinja").read_text() == "mine"


def test_an_export_past_its_bounds_is_not_kept(own_run: Path) -> None:
    folder = own_run / "students" / "student"
    assert on(own_run, "--format", "hf").code == 0
    before = (own_run / "exports" / "student" / "hf" / "model.safetensors").read_bytes()
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)  # logits overflow: nothing can be said of them
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    outcome = on(own_run, "--format", "hf")
    assert outcome.code == 1
    assert "the export does not compute what" in outcome.stderr
    assert "against its own weights (float activations): KL of inf nats, expected at most" in outcome.stderr
    assert "does not compute these weights as they are: use another version or format" in outcome.stderr
    assert "nothing was kept" in outcome.stderr
    assert "perplexity" in outcome.stdout
    assert {path.name for path in (own_run / "exports" / "student").iterdir()} == {"hf", "hf.json"}
    assert (own_run / "exports" / "student" / "hf" / "model.safetensors").read_bytes() == before


def test_an_export_that_rounds_activations_as_training_did_not_is_refused(own_run: Path) -> None:
    folder = own_run / "students" / "student"
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name in list(tensors):  # one channel is a million times the others, and no ternary weight asks for it
        if name.endswith("layernorm.weight"):
            tensors[name][7] = 1e6
        elif ".self_attn." in name or ".mlp." in name:
            tensors[name][:, 7] = 0
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused = "does: against the student as trained: KL of "
    outcome = on(own_run, "--format", "hf")
    assert outcome.code == 1
    assert refused in outcome.stderr
    assert "activations were rounded to 8 bits per position in training, and `--format hf` does" in outcome.stderr
    assert "use `--format bitnet`" in outcome.stderr
    config = json.loads((folder / "config.json").read_text())
    config["quantize"]["activations"] = "none"
    (folder / "config.json").write_text(json.dumps(config))
    outcome = on(own_run, "--format", "gguf")
    assert outcome.code == 1
    assert refused in outcome.stderr
    assert "against its own weights" not in outcome.stderr
    assert "train with student.quantize.activations = 'absmax-int8', or use `--format hf`" in outcome.stderr
    assert "bounds of the second: KL at most 0.01 nats, top-1 at least 95.0%" in outcome.stdout
    assert list((own_run / "exports" / "student").iterdir()) == []


@pytest.mark.slow
def test_without_the_runtimes_files_are_read_back(own_run: Path) -> None:
    for arguments, packages, judge in (
        (("--format", "hf"), ("transformers",), "hf, computed by the files, read back"),
        (("--format", "bitnet"), ("accelerate",), "bitnet, computed by the files, read back"),
        (("--format", "gguf"), ("xllamacpp",), "gguf TQ2_0, computed by the file, read back"),
    ):
        outcome = without(own_run, packages, *arguments)
        assert outcome.code == 0, outcome.stderr
        assert f"{judge}; its tokenizer was not run" in outcome.stdout
    shutil.rmtree(own_run / "exports")
    outcome = without(own_run, ("gguf",), "--format", "gguf")
    assert outcome.code == 1
    assert "package gguf, which is not installed; run `pip install -e '.[gguf]'`" in outcome.stderr


def test_windows_of_the_cache_serve_where_there_are_no_tokens(copied_run: Path) -> None:
    shutil.rmtree(copied_run / "data")
    outcome = on(copied_run, "--format", "hf")
    assert outcome.code == 0, outcome.stderr
    shutil.rmtree(copied_run / "cache")
    outcome = on(copied_run, "--format", "bitnet")
    assert outcome.code == 1
    assert "found neither tokens in" in outcome.stderr
    assert "run `tristill tokenize`" in outcome.stderr


def test_what_cannot_be_exported_is_said_with_what_would_serve(
    finished_run: Path, wide_run: Path, tmp_path: Path
) -> None:
    outcome = on(finished_run, "--format", "gguf")
    assert outcome.code == 1
    assert "model.layers.0.self_attn.q_proj (and 11 more): found rows of 32 weights" in outcome.stderr
    assert (
        "the next that serve are 256: set student.model.width to one of them; model.layers.0.mlp.down_pr"
        in outcome.stderr
    )
    outcome = on(finished_run, "teacher", "--format", "bitnet")
    assert outcome.code == 1
    assert "found no quantised weights, but the packed layout of transformers holds ternary weights" in outcome.stderr
    other = tmp_path / "other"
    shutil.copytree(wide_run / "students" / "student", other)
    (other / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes() + b" ")
    outcome = on(finished_run, str(other), "--format", "gguf")
    assert outcome.code == 1
    assert "found another tokenizer than" in outcome.stderr
    outcome = on(finished_run, "nobody", "--format", "hf")
    assert outcome.code == 1
    assert "nobody: found no model in" in outcome.stderr
    outcome = on(finished_run, "--format", "gguf", "--type", "both", "--out", "x.gguf")
    assert outcome.code == 2
    assert "--type both writes two files, and --out names one" in outcome.stderr
    assert not (finished_run / "exports").exists()
