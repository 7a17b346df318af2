"""The main job, as a user starts it, on real text."""

import json
from pathlib import Path

import safetensors.torch

SUMMARY_KEYS = {
    "validation": {
        "loss_nats", "perplexity", "bits_per_byte", "kl_to_teacher_nats", "top1_agreement",
        "expected_calibration_error", "acceptance_rate",
    },
    "train": {"steps", "positions", "elapsed_s", "positions_per_s", "peak_rss_mib", "loss_terms"},
    "model": {"parameters", "ternary_parameters", "packed_bytes"},
}  # fmt: skip


def test_one_command_leaves_everything_in_its_place(finished_run: Path) -> None:
    expected = [
        "config.toml", "data/data.json", "data/tokenizer.json", "data/train.npy", "data/validation.npy",
        "teacher/config.json", "teacher/model.safetensors", "teacher/tokenizer.json", "teacher/metrics.jsonl",
        "teacher/summary.json", "cache/cache.json", "cache/tokenizer.json", "cache/train-00000.h5",
        "cache/validation-00000.h5", "students/student/config.json", "students/student/model.safetensors",
        "students/student/tokenizer.json", "students/student/metrics.jsonl", "students/student/summary.json",
        "students/no-teacher/summary.json",
    ]  # fmt: skip
    assert [name for name in expected if not (finished_run / name).is_file()] == []
    assert not list(finished_run.rglob(".*"))


def test_the_students_summary_has_what_the_contract_promises(finished_run: Path) -> None:
    summary = json.loads((finished_run / "students" / "student" / "summary.json").read_text())
    for part, keys in SUMMARY_KEYS.items():
        assert keys <= summary[part].keys()
        assert all(summary[part][key] is not None for key in keys)
    assert summary["targets"] == "cached"
    assert {"cache", "teacher", "data", "student"} <= summary["fingerprints"].keys()
    assert set(summary["train"]["loss_terms"]) == {"cross_entropy", "forward_kl", "hidden_mse"}


def test_the_run_prints_the_table_of_its_models(finished_run: Path) -> None:
    lines = (finished_run / "stdout.txt").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert [name for name in names if not name.startswith("-")] == ["model", "teacher", "student", "no-teacher"]
    assert lines[-1].startswith("cache: ")
    assert lines[-1].endswith("bytes/position on disk")


def test_students_differ_only_in_what_they_were_taught(finished_run: Path) -> None:
    taught, untaught = (
        safetensors.torch.load_file(finished_run / "students" / name / "model.safetensors")
        for name in ("student", "no-teacher")
    )
    assert taught.keys() == untaught.keys()
    assert any((taught[name] != untaught[name]).any() for name in taught)
    assert not any("projection" in name for name in taught)
