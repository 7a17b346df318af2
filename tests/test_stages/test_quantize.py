"""Quantisers against slow references, and what must always hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tristill.stages.models.quantized_linear import QuantizedLinear
from tristill.stages.quantize.activations import absmax_quantize
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.quantize.straight_through import straight_through
from tristill.stages.quantize.ternary import absmean_ternary

SEEDS = st.integers(0, 2**31)
SCALES = st.sampled_from([1e-6, 1e-3, 1.0, 1e4])


def random_tensor(seed: int, scale: float, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(deadline=None)
@given(SEEDS, SCALES)
def test_absmean_is_the_papers_formula(seed: int, scale: float) -> None:
    weight = random_tensor(seed, scale, 7, 5)
    gamma = max(sum(abs(float(w)) for w in weight.flatten()) / weight.numel(), 1e-5)
    expected = torch.tensor([[gamma * max(-1, min(1, round(float(w) / gamma))) for w in row] for row in weight])
    torch.testing.assert_close(absmean_ternary(weight).dequantized(), expected, rtol=1e-5, atol=0)


@settings(deadline=None)
@given(SEEDS, SCALES)
def test_absmean_gives_trits_and_quantising_them_again_changes_no_sign(seed: int, scale: float) -> None:
    once = absmean_ternary(random_tensor(seed, scale, 16, 16))
    assert set(once.trits_OI.unique().tolist()) <= {-1, 0, 1}
    assert once.scale_RG > 0
    # The mean of |trits * gamma| is gamma times the share of nonzeros, so the scale may shrink, never a trit change.
    again = absmean_ternary(once.dequantized()) if float(once.scale_RG) > 1e-4 else once
    assert torch.equal(again.trits_OI, once.trits_OI)


@settings(deadline=None)
@given(SEEDS, st.sampled_from([1e-3, 1.0, 1e4]))
def test_absmax_is_the_papers_formula_and_idempotent(seed: int, scale: float) -> None:
    x = random_tensor(seed, scale, 3, 11)
    s = 127 / x.abs().amax(dim=-1, keepdim=True)
    expected = torch.stack([(row * factor).round().clamp(-128, 127) / factor for row, factor in zip(x, s, strict=True)])
    found = absmax_quantize(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(absmax_quantize(found), found)
    assert ((found - x).abs() <= x.abs().amax(dim=-1, keepdim=True) / 254 * 1.0001).all()


def test_quantisers_survive_zeros() -> None:
    assert absmean_ternary(torch.zeros(4, 4)).trits_OI.abs().max() == 0
    assert absmax_quantize(torch.zeros(2, 4)).abs().max() == 0


def test_straight_through_passes_the_gradient_unchanged() -> None:
    x = random_tensor(0, 1.0, 4, 6).requires_grad_()
    y = straight_through(x, absmax_quantize(x.detach()))
    upstream = random_tensor(1, 1.0, 4, 6)
    y.backward(upstream)
    torch.testing.assert_close(y, absmax_quantize(x.detach()))
    torch.testing.assert_close(x.grad, upstream)


@pytest.mark.parametrize("weights", ["absmean", "none"])
@pytest.mark.parametrize("activations", ["absmax-int8", "none"])
def test_quantized_linear_quantises_what_it_says(weights: str, activations: str) -> None:
    layer = QuantizedLinear(6, 5, QuantizeConfig.model_validate({"weights": weights, "activations": activations}))
    x = random_tensor(3, 1.0, 2, 6).requires_grad_()
    w_used = absmean_ternary(layer.weight.detach()).dequantized() if weights == "absmean" else layer.weight.detach()
    x_used = absmax_quantize(x.detach()) if activations == "absmax-int8" else x.detach()
    y = layer(x)
    torch.testing.assert_close(y, x_used @ w_used.T)
    upstream = random_tensor(4, 1.0, 2, 5)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ w_used)
    torch.testing.assert_close(layer.weight.grad, upstream.T @ x_used)
