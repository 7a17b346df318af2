"""What counts as a change between a record and the settings of now."""

from typing import Any

import pytest

from pipeline.provenance import Provenance, differences


def record(settings: dict[str, Any]) -> Provenance:
    return Provenance(
        step="dump-logits", status="complete", inputs={"teacher": "a" * 64}, settings=settings, command="", versions={}
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"cache": {"a": 1}}, {"cache": {"a": 2}}, ["cache.a: was 1, is 2"]),
        ({"cache": {}}, {"cache": {"a": None}}, []),
        ({"cache": {"hidden": {}}}, {"cache": {"hidden": {"output": "residual"}}}, []),
        (
            {"cache": {"hidden": {}}},
            {"cache": {"hidden": {"output": "mlp"}}},
            ["cache.hidden.output: was 'residual', is 'mlp'"],
        ),
        ({"teacher": {"a": 1}}, {"teacher": {"a": 1}}, []),
    ],
)
def test_a_setting_that_a_record_is_too_old_for_is_what_it_meant_then(
    old: dict[str, Any], new: dict[str, Any], expected: list[str]
) -> None:
    assert differences(record(old), new, {"teacher": "a" * 64}) == expected


def test_an_input_that_changed_is_named_and_one_that_is_not_here_is_not() -> None:
    assert differences(record({}), {}, {"teacher": "b" * 64}) == [f"input teacher: was {'a' * 12}, is {'b' * 12}"]
    assert differences(record({}), {}, {}) == []
