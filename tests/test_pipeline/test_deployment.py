"""`tristill evaluate --packed`: sizes are those of files, all forms take turns, and what cannot run says why."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import write_model

from conftest import ENVIRONMENT, ROOT, tristill
from tristill.pipeline.deployment import deployment_table
from tristill.stages.deployment.measure import measure_deployment
from tristill.stages.deployment.report import Deployment
from tristill.stages.models.checkpoint import load_model, save_model
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.hugging_face_folder import hugging_face_shape, new_hugging_face
from tristill.stages.models.origin import Origin
from tristill.stages.models.transformer import Transformer
from tristill.stages.packed.model import memory_use, pack_model
from tristill.stages.quantize.config import QuantizeConfig

SHAPE = ModelConfig(width=256, layers=1, heads=4, kv_heads=2, mlp_width=256)
FORMS = ["FP32", "fp16", "packed", "GGUF TQ2_0", "GGUF TQ1_0"]


def save(folder: Path, tokenizer: Path, quantize: QuantizeConfig | None) -> Path:
    model = Transformer(SHAPE, 512, quantize)
    model.initialize(torch.Generator().manual_seed(0))
    save_model(folder, model, tokenizer, context_length=16, end_of_text_id=0)
    return folder


def forms_of(found: Deployment, model: str) -> list[str]:
    return [form.form for form in found.forms if form.model == model]


def test_all_forms_are_measured_side_by_side(finished_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    tokenizer = finished_run / "teacher" / "tokenizer.json"
    teacher = save(tmp_path / "teacher", tokenizer, None)
    student = save(tmp_path / "student", tokenizer, QuantizeConfig())
    found = measure_deployment(teacher, {"student": student}, threads=1, rounds=2)
    assert (found.threads, found.prompt_tokens, found.new_tokens, found.rounds) == (1, 8, 4, 2)
    assert forms_of(found, "student") == FORMS
    by_form = {form.form: form for form in found.forms if form.model == "student"}
    fp32 = (student / "model.safetensors").stat().st_size
    use = memory_use(pack_model(load_model(student)))
    sizes = {name: form.disk_bytes or 0 for name, form in by_form.items()}
    assert sizes["FP32"] == fp32
    header = 2000
    assert 0 <= sizes["fp16"] - fp32 // 2 < header
    layers = len(load_model(student).quantized_linears())
    assert 0 <= sizes["packed"] - (use.packed_bytes - 2 * layers) - 2 * use.dense_weights < header, (
        "scales are fp16 too"
    )
    assert sizes["GGUF TQ1_0"] < sizes["GGUF TQ2_0"] < sizes["fp16"]
    assert by_form["packed"].of_fp32 == sizes["packed"] / fp32
    for form in [
        form for form in found.forms if form.form != "fp16" and (form.model, form.form) != ("student", "FP32")
    ]:
        assert form.why_not is None
        assert form.runtime == ("llama.cpp" if form.form.startswith("GGUF") else "PyTorch")
        for speed in (form.prompt, form.generation):
            assert speed is not None
            assert 0 < speed.tokens_per_s.min <= speed.tokens_per_s.median <= speed.tokens_per_s.max
    assert by_form["FP32"].prompt is None, "latent weights are not what runs"
    assert found.forms[0].prompt is not None
    assert found.forms[0].prompt.to_teacher.model_dump() == {"median": 1, "min": 1, "max": 1}


def test_a_teacher_and_a_student_of_transformers_are_measured_as_far_as_they_have_forms(
    finished_run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    tokenizer = finished_run / "teacher" / "tokenizer.json"
    write_model(tmp_path / "given", "qwen3", tokenizer, outputs=512, eos_token_id=[0, 1])
    Origin(folder=tmp_path / "given", dtype="bfloat16").with_fingerprint().save(save_place(tmp_path / "teacher"))
    shutil.copy(tmp_path / "given" / "config.json", tmp_path / "teacher")
    shutil.copy(tokenizer, tmp_path / "teacher")
    own = save(tmp_path / "student", tokenizer, QuantizeConfig())
    shape = hugging_face_shape(tmp_path / "given")
    other = new_hugging_face(shape, 512, QuantizeConfig(), seed=0)
    save_model(tmp_path / "other", other, tokenizer, context_length=16, end_of_text_id=0)
    found = measure_deployment(tmp_path / "teacher", {"student": own, "other": tmp_path / "other"}, threads=1, rounds=1)
    assert forms_of(found, "teacher") == ["BF16", "fp16"]
    teacher = found.forms[0]
    in_float32 = (tmp_path / "given" / "model.safetensors").stat().st_size
    assert teacher.disk_bytes == pytest.approx(in_float32 / 2, rel=0.02)
    assert teacher.generation is not None
    by_form = {form.form: form for form in found.forms if form.model == "other"}
    assert by_form["packed"].why_not == "packed weights are for our own transformer, and this is qwen3 of transformers"
    assert "goes out in its own format only" in (by_form["GGUF TQ2_0"].why_not or "")
    assert by_form["fp16"].disk_bytes
    packed = next(form for form in found.forms if (form.model, form.form) == ("student", "packed"))
    assert packed.generation is not None
    assert packed.generation.to_teacher is not None


def save_place(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_what_cannot_be_a_file_or_be_packed_says_why_and_the_rest_is_measured(copied_run: Path, tmp_path: Path) -> None:
    outcome = tristill(
        "evaluate", "--packed", "student", "--config", "configs/test.toml", "--run-dir", str(copied_run), "--threads", "1"
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    assert "| student | packed " in outcome.stdout
    assert "not run (1)" in outcome.stdout
    assert "(1) a GGUF file of ternary blocks cannot hold this student" in outcome.stdout
    assert "threads of each: 1" in outcome.stdout
    written = Deployment.model_validate_json((copied_run / "deployment.json").read_bytes())
    assert deployment_table(written) == outcome.stdout.rstrip("\n")
    dense = save(tmp_path / "dense", copied_run / "teacher" / "tokenizer.json", QuantizeConfig(weights="none"))
    found = measure_deployment(copied_run / "teacher", {"dense": dense}, threads=1, rounds=1)
    reasons = {form.form: form.why_not for form in found.forms if form.model == "dense"}
    assert reasons["packed"] == "found no ternary weights, and others are not packed"
    assert "ternary weights" in (reasons["GGUF TQ2_0"] or "")


def test_without_the_packages_of_gguf_the_rest_is_measured(copied_run: Path) -> None:
    """A module that is None in sys.modules is one that is not installed, as Python sees it."""
    script = (
        "import sys; sys.modules['gguf'] = sys.modules['xllamacpp'] = None; "
        "from tristill.pipeline.cli import cli; cli.main(sys.argv[1:], standalone_mode=False)"
    )
    arguments = ["evaluate", "--packed", "--json", "--config", "configs/test.toml", "--run-dir", str(copied_run)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = Deployment.model_validate(json.loads(done.stdout))
    by_form = {form.form: form for form in found.forms if form.model == "student"}
    assert "package gguf, which is not installed" in (by_form["GGUF TQ2_0"].why_not or "")
    assert by_form["packed"].generation is not None
    assert found.xllamacpp is None


def test_threads_without_packed_are_refused(copied_run: Path) -> None:
    outcome = tristill(
        "evaluate", "--threads", "2", "--config", "configs/test.toml", "--run-dir", str(copied_run)
    )  # fmt: skip
    assert outcome.code == 2
    assert "--threads belongs to --packed" in outcome.stderr
