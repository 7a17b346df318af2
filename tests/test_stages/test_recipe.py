"""The recipe of ternary pre-training: a second phase of the learning rate, weight decay that ends."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from toy_training import batches_from, config, logged, make_module, state, training

from tristill.stages.training.config import TrainingConfig
from tristill.stages.training.schedule import learning_rate, weight_decay

SCHEDULES = ["cosine", "linear", "trapezoid"]


def plain_rates(settings: TrainingConfig, start: float, fraction: float) -> list[float]:
    """Rates of all steps, by joining the corners of the curve (linear, trapezoid) or from the cosine itself."""
    steps, warmup, peak = settings.steps, settings.warmup_steps, settings.learning_rate
    last = settings.final_lr_fraction * peak
    up = [peak * k / warmup for k in range(1, warmup + 1)]
    if settings.schedule == "cosine":
        angles = np.linspace(0, math.pi, steps - warmup)
        down = [last + (peak - last) * (math.cos(angle) + 1) / 2 for angle in angles]
    else:
        flat_until = warmup if settings.schedule == "linear" else steps - 1 - round(settings.decay_fraction * steps)
        down = list(np.interp(np.arange(warmup, steps), [flat_until, steps - 1], [peak, last]))
    rates = up + down
    for step in range(steps):
        if step + 0.5 > start * steps:
            rates[step] = fraction * rates[step]
    return rates


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("start", "fraction"), [(0.5, 2 / 3), (0.25, 0.1), (0.81, 0.9)])
def test_the_second_phase_lowers_every_schedule_from_its_step_on(schedule: str, start: float, fraction: float) -> None:
    changes = {"schedule": schedule, "steps": 100, "warmup_steps": 7, "decay_fraction": 0.3}
    phase = {"start": start, "lr_fraction": fraction}
    with_phase, without = config(**changes, second_phase=phase), config(**changes)
    found = [learning_rate(with_phase, step) for step in range(100)]
    assert found == pytest.approx(plain_rates(with_phase, start, fraction), rel=1e-12)
    assert [learning_rate(without, step) for step in range(100)] == pytest.approx(plain_rates(without, 1, 1), rel=1e-12)


def test_the_defaults_of_a_linear_second_phase_are_the_rates_of_the_published_recipe() -> None:
    """700M of the report: on the line from 1.5e-3 to 0, then on that from 1e-3."""
    recipe = config(
        schedule="linear", second_phase={}, steps=1001, warmup_steps=0, learning_rate=1.5e-3, final_lr_fraction=0
    )
    assert recipe.second_phase_step == 500
    expected = {0: 1.5e-3, 250: 1.125e-3, 499: 0.7515e-3, 500: 0.5e-3, 750: 0.25e-3, 1000: 0.0}
    assert {step: learning_rate(recipe, step) for step in expected} == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("until", "steps", "decayed"), [(1.0, 20, 20), (0.5, 20, 10), (0.3, 7, 2), (0.99, 20, 20)])
def test_weight_decay_ends_at_its_step(until: float, steps: int, decayed: int) -> None:
    settings = config(steps=steps, weight_decay=0.3, weight_decay_until=until)
    assert [weight_decay(settings, step) for step in range(steps)] == [0.3] * decayed + [0.0] * (steps - decayed)


def test_training_follows_rate_and_decay_of_every_step(tmp_path: Path) -> None:
    """Against AdamW written out here in float64: Loshchilov and Hutter 2019, algorithm 2; decay on matrices only."""
    settings = config(
        schedule="linear", second_phase={"start": 0.6}, weight_decay=0.8, weight_decay_until=0.4, grad_clip=None
    )
    module, reference = make_module(), make_module().double()
    training(tmp_path, module, settings).run()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in reference.parameters()]
    for step, batch in zip(range(settings.steps), batches_from(0), strict=False):
        inputs = batch.double()
        reference.zero_grad()
        (reference(inputs) - inputs.sum(-1, keepdim=True)).square().mean().backward()
        rate = plain_rates(settings, 0.6, 2 / 3)[step]
        for parameter, (first, second) in zip(reference.parameters(), moments, strict=True):
            assert parameter.grad is not None
            first.copy_(0.9 * first + 0.1 * parameter.grad)
            second.copy_(0.95 * second + 0.05 * parameter.grad**2)
            mean, variance = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.95 ** (step + 1))
            decay = 0.8 if step < 8 and parameter.ndim == 2 else 0.0
            parameter.data -= rate * (mean / (variance.sqrt() + 1e-8) + decay * parameter.data)
    for found, expected in zip(state(module), state(reference), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    always = make_module()
    training(tmp_path / "always", always, settings.model_copy(update={"weight_decay_until": 1.0})).run()
    assert not torch.allclose(state(always)[0], state(module)[0], rtol=1e-3)


@pytest.mark.parametrize("stop_at", [4, 7, 11, 17])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_resumed_on_either_side_of_the_switch_equals_an_uninterrupted_one(
    tmp_path: Path, stop_at: int, schedule: str
) -> None:
    settings = config(schedule=schedule, second_phase={}, weight_decay=0.5, weight_decay_until=0.7, checkpoint_every=3)
    whole, resumed = make_module(), make_module()
    training(tmp_path / "whole", whole, settings).run()
    with pytest.raises(RuntimeError, match="pulled the plug"):
        training(tmp_path / "cut", make_module(), settings, stop_at=stop_at).run()
    training(tmp_path / "cut", resumed, settings).run()
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(resumed), strict=True))
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


def test_weight_decay_is_logged_where_it_changes(tmp_path: Path) -> None:
    training(tmp_path / "changes", make_module(), config(weight_decay=0.5, weight_decay_until=0.5)).run()
    found = {line["step"]: line["weight_decay"] for line in logged(tmp_path / "changes")}
    assert found == {1: 0.5, 3: 0.5, 6: 0.5, 9: 0.5, 12: 0.0, 15: 0.0, 18: 0.0, 20: 0.0}
    training(tmp_path / "stays", make_module(), config()).run()
    assert not any("weight_decay" in line for line in logged(tmp_path / "stays"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"second_phase": {"start": 0.15}},
            r"start = 0.15 is step 3 of 20; expected one after the warm-up \(4 steps\)",
        ),
        ({"second_phase": {"start": 0.98}}, r"start = 0.98 is step 20 of 20; .* and before the end"),
        ({"second_phase": {"start": 1.0}}, "less than 1"),
        ({"second_phase": {"lr_fraction": 1.0}}, "less than 1"),
        ({"second_phase": {"lr_fraction": 0.0}}, "greater than 0"),
        ({"weight_decay_until": 0.0}, "greater than 0"),
        ({"weight_decay_until": 1.5}, "less than or equal to 1"),
    ],
)
def test_phases_that_do_not_come_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_records_of_models_trained_before_these_settings_stay_valid() -> None:
    numbers = config().numbers()
    assert {"second_phase", "weight_decay_until"}.isdisjoint(numbers)
    assert numbers["final_lr_fraction"] == 0.1
    changed = config(second_phase={}, weight_decay_until=0.5).numbers()
    assert changed == {**numbers, "second_phase": {"start": 0.5, "lr_fraction": 2 / 3}, "weight_decay_until": 0.5}
    assert json.loads(json.dumps(changed)) == changed
