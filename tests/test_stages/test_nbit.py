"""Codes of n bits: against slow references, what must always hold, and that their settings cannot contradict."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tristill.stages.losses.term import LossValues
from tristill.stages.models.quantized_linear import QuantizedLinear
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.quantize.learned import NbitLearned
from tristill.stages.quantize.nbit import Nbit, NbitDiffused, largest_level
from tristill.stages.training.config import TrainingConfig
from tristill.stages.training.loop import StepInfo, Training
from tristill.stages.training.optimizer import make_optimizer

SEEDS = st.integers(0, 2**31)
BITS = st.integers(2, 8)
SCALES = st.sampled_from([1e-7, 1e-3, 1.0, 1e4])


def random_tensor(seed: int, scale: float, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def coder(bits: int, *, error_diffusion: bool = False) -> Nbit:
    return (NbitDiffused if error_diffusion else Nbit)(bits=bits)


def learned_layer(bits: int) -> QuantizedLinear:
    settings = {"weights": "nbit-learned", "bits": bits, "activations": "none"}
    return QuantizedLinear(6, 5, QuantizeConfig.model_validate(settings))


def sequential_codes(row: list[float], largest: int) -> tuple[list[int], int]:
    """(codes, number of clipped ones): error diffusion as the textbook says it, one weight after the other."""
    codes, error, clipped = [], 0.0, 0
    for x in row:
        wanted = math.floor(x + error + 0.5)
        code = max(-largest, min(largest, wanted))
        clipped += code != wanted
        error += x - code
        codes.append(code)
    return codes, clipped


@settings(deadline=None)
@given(SEEDS, SCALES, BITS)
def test_nbit_is_round_of_weight_over_scale_row_by_row(seed: int, scale: float, bits: int) -> None:
    weight = random_tensor(seed, scale, 4, 9)
    largest = 2 ** (bits - 1) - 1
    codes, found_scale = coder(bits).codes(weight)
    for row, row_codes, row_scale in zip(weight.tolist(), codes.tolist(), found_scale.flatten().tolist(), strict=True):
        expected_scale = max(*(abs(w) for w in row), 1e-5) / largest
        assert row_scale == expected_scale
        assert row_codes == [round(w / expected_scale) for w in row]
        assert max(map(abs, row_codes)) <= largest
    torch.testing.assert_close(coder(bits).quantize(weight).double(), codes * found_scale)


@settings(deadline=None)
@given(SEEDS, SCALES, BITS, st.integers(1, 200))
def test_error_diffusion_without_a_loop_is_the_sequential_definition_and_never_clips(
    seed: int, scale: float, bits: int, columns: int
) -> None:
    weight = random_tensor(seed, scale, 3, columns)
    codes, row_scale = NbitDiffused(bits=bits).codes(weight)
    for row, row_codes in zip((weight.double() / row_scale).tolist(), codes.tolist(), strict=True):
        expected, clipped = sequential_codes(row, largest_level(bits))
        assert row_codes == expected
        assert clipped == 0


@settings(deadline=None)
@given(st.lists(st.integers(-28, 28), min_size=1, max_size=60))
def test_error_diffusion_is_the_sequential_definition_on_ties_too(quarters: list[int]) -> None:
    row = [quarter / 4 for quarter in quarters]  # exact in floating point, so that many sums end in 1/2
    expected, clipped = sequential_codes(row, 7)
    assert NbitDiffused(bits=4).rounded(torch.tensor([row])).tolist() == [expected]
    assert clipped == 0


def test_a_row_at_the_last_level_stays_there_whatever_error_arrives() -> None:
    row = torch.tensor([[0.5, 7.0, 7.0, -0.5, 0.5, -7.0, -7.0]], dtype=torch.float64)
    assert NbitDiffused(bits=4).rounded(row).tolist() == [[1, 7, 7, -1, 1, -7, -7]]
    assert NbitDiffused(bits=4).rounded(-row).abs().max() == 7


@settings(deadline=None)
@given(SEEDS, SCALES, BITS, st.booleans(), st.integers(1, 300))
def test_quantising_what_is_quantised_changes_no_bit(
    seed: int, scale: float, bits: int, error_diffusion: bool, columns: int
) -> None:
    once = coder(bits, error_diffusion=error_diffusion).quantize(random_tensor(seed, scale, 5, columns))
    assert torch.equal(coder(bits, error_diffusion=error_diffusion).quantize(once), once)


@settings(deadline=None)
@given(SEEDS, SCALES, BITS, st.integers(1, 300))
def test_error_diffusion_keeps_the_sum_of_every_part_of_a_row_within_half_a_step(
    seed: int, scale: float, bits: int, columns: int
) -> None:
    weight = random_tensor(seed, scale, 4, columns)
    codes, step = NbitDiffused(bits=bits).codes(weight)
    errors = (codes * step - weight.double()).cumsum(-1) / step
    assert errors.abs().max() <= 0.5 + 1e-6
    assert ((codes - weight.double() / step).abs() <= 1 + 1e-6).all()
    mean_error = (codes * step).mean(-1) - weight.double().mean(-1)
    assert (mean_error.abs() <= step.flatten() / (2 * columns) * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_diffusion_keeps_means_of_rows_better_than_rounding_does_and_costs_twice_the_square_error(
    bits: int,
) -> None:
    weight = random_tensor(0, 0.02, 400, 256)
    errors = {}
    for error_diffusion in (False, True):
        codes, step = coder(bits, error_diffusion=error_diffusion).codes(weight)
        errors[error_diffusion] = codes - weight.double() / step
    mean = {which: float(error.mean(-1).abs().mean()) for which, error in errors.items()}
    square = {which: float(error.square().mean()) for which, error in errors.items()}
    assert mean[True] < mean[False] / 5
    if bits > 2:  # rounding errors of 2 bits are not uniform: most weights become zero
        assert square[False] == pytest.approx(1 / 12, rel=0.02)
        assert square[True] == pytest.approx(1 / 6, rel=0.02)


def lsq_reference(
    weight: torch.Tensor, step: float, bits: int, upstream: torch.Tensor
) -> tuple[list[float], list[float], float]:
    """(quantised, gradient of the weights, gradient of the step), weight by weight in float64: LSQ, equations 1-3."""
    q_p = 2 ** (bits - 1) - 1
    quantized, weight_gradient, step_gradient = [], [], 0.0
    for v, g in zip(weight.double().flatten().tolist(), upstream.double().flatten().tolist(), strict=True):
        x = v / step
        if x <= -q_p:
            level, slope, passes = -q_p, -q_p, 0
        elif x >= q_p:
            level, slope, passes = q_p, q_p, 0
        else:
            level, slope, passes = round(x), -x + round(x), 1
        quantized.append(level * step)
        weight_gradient.append(g * passes)
        step_gradient += g * slope
    return quantized, weight_gradient, step_gradient / math.sqrt(weight.numel() * q_p)


@settings(deadline=None)
@given(SEEDS, SCALES, BITS, st.floats(0.05, 20))
def test_learned_step_has_the_papers_values_and_gradients(seed: int, scale: float, bits: int, ratio: float) -> None:
    weight = random_tensor(seed, scale, 6, 7).double().requires_grad_()
    upstream = random_tensor(seed + 1, 1.0, 6, 7).double()
    lsq = NbitLearned(bits=bits)
    step = (lsq.initial_step(weight.detach()) * ratio).requires_grad_()
    values = lsq.quantize(weight.detach(), step.detach())
    assert isinstance(values, torch.Tensor)
    quantized = lsq.with_gradient(weight, values, step)
    quantized.backward(upstream)
    expected = lsq_reference(weight.detach(), float(step.detach()), bits, upstream)
    torch.testing.assert_close(quantized.flatten().tolist(), expected[0])
    assert weight.grad is not None
    assert step.grad is not None
    assert weight.grad.flatten().tolist() == expected[1]
    assert float(step.grad) == pytest.approx(expected[2], rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(SEEDS, SCALES, BITS)
def test_learned_quantising_what_is_quantised_changes_no_bit(seed: int, scale: float, bits: int) -> None:
    weight = random_tensor(seed, scale, 6, 7)
    lsq = NbitLearned(bits=bits)
    step = lsq.initial_step(weight)
    assert float(step) == pytest.approx(2 * max(float(weight.abs().mean()), 1e-5) / largest_level(bits) ** 0.5)
    once = lsq.quantize(weight, step)
    assert isinstance(once, torch.Tensor)
    assert torch.equal(cast("torch.Tensor", lsq.quantize(once, step)), once)


def test_a_layer_of_a_learned_step_trains_its_logarithm() -> None:
    layer = learned_layer(3)
    assert layer.log_step is not None
    torch.testing.assert_close(layer.log_step.exp(), NbitLearned(bits=3).initial_step(layer.weight).squeeze())
    x, upstream = random_tensor(3, 1.0, 2, 6), random_tensor(4, 1.0, 2, 5)
    layer(x).backward(upstream)
    step = float(layer.log_step.detach().exp())
    _, weight_gradient, step_gradient = lsq_reference(layer.weight.detach(), step, 3, upstream.T @ x)
    assert layer.weight.grad is not None
    assert layer.log_step.grad is not None
    torch.testing.assert_close(layer.weight.grad.flatten().tolist(), weight_gradient, rtol=1e-5, atol=1e-6)
    assert float(layer.log_step.grad) == pytest.approx(step * step_gradient, rel=1e-4)


def test_a_learned_step_stays_positive_and_bears_no_weight_decay(tmp_path: Path) -> None:
    config = TrainingConfig(steps=60, learning_rate=0.3, batch_windows=4, checkpoint_every=25, weight_decay=0.5)

    def make_layer() -> QuantizedLinear:
        torch.manual_seed(1)
        return learned_layer(4)

    def batches(first: int) -> Iterator[torch.Tensor]:
        return (random_tensor(number, 1.0, 4, 6) for number in range(first, 1000))

    def train(layer: QuantizedLinear, folder: Path, num_batches: int | None = None) -> None:
        def loss(batch: torch.Tensor, info: StepInfo) -> LossValues:
            value = layer(batch).square().mean()  # best at zero: the step shrinks without end
            return LossValues(value, {"square": value.detach()})

        Training("test", layer, loss, lambda n: islice(batches(n), num_batches), 4, config, folder).run()

    whole = make_layer()
    before = float(whole.log_step.detach().exp())  # type: ignore[union-attr]
    train(whole, tmp_path / "whole")
    assert whole.log_step is not None
    after = float(whole.log_step.detach().exp())
    assert 0 < after < before / 10
    resumed = make_layer()
    with pytest.raises(StopIteration):
        train(resumed, tmp_path / "cut", num_batches=30)
    resumed = make_layer()
    train(resumed, tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    groups = make_optimizer(whole, config).param_groups
    assert {p.ndim: group["weight_decay"] for group in groups for p in group["params"]} == {2: 0.5, 0: 0.0}
