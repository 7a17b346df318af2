"""Products in integers equal the plain float32 simulation; what is rounded, and by how much, is stated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tristill.stages.models.description import ModelConfig
from tristill.stages.models.quantized_linear import QuantizedLinear, project
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.activations import absmax_codes, absmax_quantize
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.quantize.gradients import straight_through

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]
SEEDS = st.integers(0, 2**31)


def simulated(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """BitLinear as it is written everywhere: both factors rounded to values of their codes, multiplied in float32."""
    values = layer.ternary().dequantized()
    return torch.nn.functional.linear(straight_through(x, absmax_quantize(x)), straight_through(layer.weight, values))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(33, 64, 24), (9, 256, 8), (20, 768, 256)])
def test_values_and_gradients_are_those_of_the_simulation_in_float32(
    device: str, per: str, rows: int, inputs: int, outputs: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    layer = QuantizedLinear(inputs, outputs, QuantizeConfig.model_validate({"scale_per": per})).to(device)
    x = (torch.randn(2, rows, inputs, generator=generator) * 3).to(device).requires_grad_()
    upstream = torch.randn(2, rows, outputs, generator=generator).to(device)
    expected = simulated(layer, x)
    wanted = torch.autograd.grad(expected, [x, layer.weight], upstream)
    assert layer.codes_of(x) is not None
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for gradient, other in zip(torch.autograd.grad(found, [x, layer.weight], upstream), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(SEEDS, st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_sums_are_exact(seed: int, scale: float) -> None:
    """In float64 nothing is rounded but the scales: the product agrees to the last bits of float32."""
    generator = torch.Generator().manual_seed(seed)
    layer = QuantizedLinear(512, 16, QuantizeConfig())
    x = torch.randn(9, 512, generator=generator) * scale
    codes, ternary = absmax_codes(x), layer.ternary()
    exact = codes.codes_NI.double() @ ternary.trits_OI.double().T
    expected = exact * codes.step_N1.double() * ternary.scale_RG.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast_the_result_and_the_gradients_are_rounded_to_bfloat16_and_no_more(device: str) -> None:
    layer = QuantizedLinear(256, 64, QuantizeConfig()).to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 256, generator=generator).to(device).requires_grad_()
    upstream = torch.randn(40, 64, generator=generator).to(device)
    expected = simulated(layer, x)
    wanted = torch.autograd.grad(expected, [x, layer.weight], upstream)
    with torch.autocast(device, torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert (
        torch.equal(found, expected.bfloat16()) or (found.float() - expected).abs().max() < 2**-8 * expected.abs().max()
    )
    gradients = torch.autograd.grad(found, [x, layer.weight], upstream.bfloat16())
    for gradient, other in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - other).norm() < 0.01 * other.norm()


def test_layers_that_read_the_same_input_share_its_codes_and_change_nothing() -> None:
    layers = [
        QuantizedLinear(32, 8, QuantizeConfig()),
        torch.nn.Linear(32, 8),
        QuantizedLinear(32, 4, QuantizeConfig()),
    ]
    x = torch.randn(3, 5, 32, requires_grad=True)
    together = torch.cat(project(x, *layers), dim=-1)
    apart = torch.cat([layer(x) for layer in layers], dim=-1)
    assert torch.equal(together, apart)
    upstream = torch.randn_like(apart)
    sources = [x, *(layer.weight for layer in layers)]
    pairs = zip(
        torch.autograd.grad(together, sources, upstream), torch.autograd.grad(apart, sources, upstream), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_scales_per_group_and_full_precision_activations_take_float_products() -> None:
    for config in (QuantizeConfig(scale_per="group-128"), QuantizeConfig(activations="none")):
        layer = QuantizedLinear(256, 8, config)
        x = torch.randn(4, 256)
        assert layer.codes_of(x) is None
        used = x if config.activations == "none" else absmax_quantize(x)
        torch.testing.assert_close(layer(x), used @ layer.ternary().dequantized().T)


def test_micro_batches_of_a_step_add_up_although_weights_are_quantised_once() -> None:
    shape = ModelConfig(width=32, layers=2, heads=2, mlp_width=48)
    for code in ("absmean", "learned", "seq"):
        model = Transformer(shape, 50, QuantizeConfig.model_validate({"weights": code}))
        model.initialize(torch.Generator().manual_seed(1))
        ids = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(2))
        model.logits(ids).square().mean().backward()
        whole = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        for half in ids.chunk(2):
            (model.logits(half).square().mean() / 2).backward()
        parts = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
