"""What tables say of a student's loss."""

from typing import Any

import pytest

from tristill.pipeline.results import loss_text


@pytest.mark.parametrize(
    ("distill", "text"),
    [
        ({"alpha": 0.2, "losses": None}, "0.2"),
        ({"alpha": 1}, "1"),
        ({"alpha": None, "losses": None}, "0.5"),
        ({"alpha": {"kind": "linear", "start": 1.0, "end": 0.2}}, "linear"),
        (
            {"losses": [{"kind": "cross_entropy", "weight": 0.2}, {"kind": "reverse_kl", "weight": {"kind": "step"}}]},
            "cross_entropy 0.2, reverse_kl step",
        ),
    ],
)
def test_a_loss_is_named_by_alpha_or_by_its_terms(distill: dict[str, Any], text: str) -> None:
    assert loss_text(distill) == text
