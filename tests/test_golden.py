"""What runs give is what they gave before: see golden_values.py, and how to keep other values on purpose."""

from collections.abc import Iterator

import pytest
from golden_values import CASES, Golden, compare, differences, read_kept

pytest.importorskip("transformers", reason="the extra `hf` is not installed")
pytest.importorskip("gguf", reason="the extra `gguf` is not installed")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    with Golden(tmp_path_factory.mktemp("golden")) as runs:
        yield runs


def test_a_run_of_each_profile_gives_the_golden_values(golden: Golden) -> None:
    lines = compare(golden, [name for name, case in CASES.items() if case.is_ordinary])
    assert not lines, "\n".join(lines)


@pytest.mark.slow
def test_every_loss_target_quantiser_and_export_gives_the_golden_values(golden: Golden) -> None:
    lines = compare(golden, CASES)
    assert not lines, "\n".join(lines)


def test_every_case_has_golden_values_and_none_is_left_over() -> None:
    kept = read_kept()
    assert list(kept) == ["versions", *CASES]
    assert [name for name, values in kept.items() if not values] == []


def test_a_difference_names_case_artefact_step_found_and_expected() -> None:
    expected = {"metrics.jsonl loss": "6.5 6.25 6.0", "model.safetensors": "ab", "train.npy": "cd"}
    found = {"metrics.jsonl loss": "6.5 6.26 6.1", "model.safetensors": "ab", "test.npy": "cd"}
    assert differences("student/twn", found, expected) == [
        "student/twn: metrics.jsonl loss: step 2: found 6.26, expected 6.25",
        "student/twn: test.npy: found cd, expected nothing",
        "student/twn: train.npy: found nothing, expected cd",
    ]
    assert differences("student/twn", {"loss": "1.0"}, {"loss": "1.0 2.0"}) == [
        "student/twn: loss: found 1 steps, expected 2"
    ]
