"""Ternary codes: each against its formula in plain Python, idempotence, gradients, and what settings are refused."""

import math
from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tristill.stages.errors import StageError
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.quantized_linear import QuantizedLinear
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.config import QuantizeConfig, ScalePer
from tristill.stages.quantize.learned import initial_seq_step, initial_step, learned_ternary, seq_ternary, through_step
from tristill.stages.quantize.ternary import TernaryWeight, absmean_ternary, blocks, twn_ternary

SEEDS = st.integers(0, 2**31)
SCALES = st.sampled_from([1e-3, 1.0, 1e4])
PER: tuple[ScalePer, ...] = ("tensor", "row", "group-128", "group-256")
SHAPE = ModelConfig(width=16, layers=2, heads=2, mlp_width=24)


def random_weight(seed: int, scale: float, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def plain_blocks(weight: torch.Tensor, per: ScalePer) -> Iterator[list[tuple[int, int]]]:
    """Places of the weights that share a scale, as the words of the config say it."""
    rows, columns = weight.shape
    if per == "tensor":
        yield [(row, column) for row in range(rows) for column in range(columns)]
        return
    size = columns if per == "row" else int(per.split("-")[1])
    for row in range(rows):
        for first in range(0, columns, size):
            yield [(row, column) for column in range(first, first + size)]


def plain_absmean(values: list[float]) -> list[float]:
    gamma = max(math.fsum(abs(w) for w in values) / len(values), 1e-5)
    return [gamma * max(-1, min(1, round(w / gamma))) for w in values]


def plain_twn(values: list[float]) -> list[float]:
    threshold = 0.7 * math.fsum(abs(w) for w in values) / len(values)
    kept = [abs(w) for w in values if abs(w) > threshold]
    scale = max(math.fsum(kept) / len(kept), 1e-5) if kept else 0.0
    return [math.copysign(scale, w) if abs(w) > threshold else 0.0 for w in values]


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("quantize", "plain"), [(absmean_ternary, plain_absmean), (twn_ternary, plain_twn)])
@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, scale=SCALES)
def test_a_code_is_its_formula_in_every_block(
    per: ScalePer,
    quantize: Callable[[torch.Tensor, ScalePer], TernaryWeight],
    plain: Callable[[list[float]], list[float]],
    seed: int,
    scale: float,
) -> None:
    weight = random_weight(seed, scale, 2, 512)
    found = quantize(weight, per)
    expected = torch.zeros_like(weight)
    for places in plain_blocks(weight, per):
        for place, value in zip(places, plain([float(weight[p]) for p in places]), strict=True):
            expected[place] = value
    torch.testing.assert_close(found.dequantized(), expected, rtol=1e-5, atol=0)
    assert set(found.trits_OI.unique().tolist()) <= {-1, 0, 1}
    assert found.trits_OI.dtype == torch.int8
    assert (found.scale_RG > 0).all()
    is_kept = blocks(weight.abs(), per) > found.threshold.reshape(blocks(weight, per).shape[:-1])[..., None]
    assert torch.equal(is_kept.reshape(weight.shape), found.trits_OI != 0)


@pytest.mark.parametrize("per", PER)
@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, scale=SCALES)
def test_quantising_again_changes_no_trit_and_with_twn_no_scale(per: ScalePer, seed: int, scale: float) -> None:
    weight = random_weight(seed, scale, 3, 256)
    once = absmean_ternary(weight, per)
    assert torch.equal(absmean_ternary(once.dequantized(), per).trits_OI, once.trits_OI)
    kept = twn_ternary(weight, per)
    again = twn_ternary(kept.dequantized(), per)
    assert torch.equal(again.trits_OI, kept.trits_OI)
    torch.testing.assert_close(again.scale_RG, kept.scale_RG)


@settings(deadline=None)
@example(seed=0, scale=1.0, ratio=3.0, per_row=True)  # 1.5 times the largest over its step: between two levels
@given(seed=SEEDS, scale=SCALES, ratio=st.floats(0.05, 20), per_row=st.booleans())
def test_learned_and_seq_are_their_formulas_and_idempotent_at_their_step(
    seed: int, scale: float, ratio: float, per_row: bool
) -> None:
    weight = random_weight(seed, scale, 4, 9)
    per: ScalePer = "row" if per_row else "tensor"
    step = initial_step(weight, 2, per) * ratio
    learned = learned_ternary(weight, step)
    wide = initial_seq_step(weight, per) * ratio
    seq = seq_ternary(weight, wide)
    for row in range(4):
        for column in range(9):
            own, own_wide = float(step.expand(4, 1)[row, 0]), float(wide.expand(4, 1)[row, 0])
            w = float(weight[row, column])
            # The nearest whole number; between two, float32's quotient may fall on either side.
            assert abs(int(learned.trits_OI[row, column]) - max(-1, min(1, w / own))) <= 0.5 + 1e-6
            assert abs(int(seq.trits_OI[row, column]) - 1.5 * max(-0.99, min(0.99, w / own_wide))) <= 0.5 + 1e-6
    torch.testing.assert_close(seq.dequantized(), seq.trits_OI * wide * (2 / 3))
    assert torch.equal(learned_ternary(learned.dequantized(), step).trits_OI, learned.trits_OI)
    assert torch.equal(seq_ternary(seq.dequantized(), wide).trits_OI, seq.trits_OI)


def test_seq_starts_with_the_largest_weight_on_the_border_of_its_range() -> None:
    weight = torch.tensor([[0.1, -0.5, 0.3], [2.0, 1.0, 0.0]])
    assert initial_seq_step(weight, "row").tolist() == [[0.5], [2.0]]
    assert initial_seq_step(weight).tolist() == [[2.0]]
    assert seq_ternary(weight, initial_seq_step(weight, "row")).trits_OI.tolist() == [[0, -1, 1], [1, 1, 0]]


@settings(deadline=None)
@given(SEEDS, st.floats(0.1, 10))
def test_a_step_per_row_has_the_gradients_of_its_row(seed: int, ratio: float) -> None:
    """W_q = step q(W / step): the weight's passes inside, the step's is q - x inside and q outside, over sqrt(N)."""
    weight = random_weight(seed, 1.0, 3, 8).double().requires_grad_()
    upstream = random_weight(seed + 1, 1.0, 3, 8).double()
    step = (initial_seq_step(weight.detach(), "row") * ratio).requires_grad_()
    values = seq_ternary(weight.detach(), step.detach()).dequantized().double()
    through_step(weight, step, values, 1).backward(upstream)
    for row in range(3):
        slope_sum = 0.0
        for column in range(8):
            x = float(weight.detach()[row, column] / step.detach()[row, 0])
            q = round(1.5 * max(-0.99, min(0.99, x))) / 1.5
            inside = abs(x) < 1
            slope_sum += float(upstream[row, column]) * (q - x if inside else q)
            assert float(cast("torch.Tensor", weight.grad)[row, column]) == float(upstream[row, column]) * inside
        assert float(cast("torch.Tensor", step.grad)[row, 0]) == pytest.approx(slope_sum / math.sqrt(24), rel=1e-5)


@pytest.mark.parametrize("code", ["absmean", "twn", "learned", "seq"])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_a_layer_multiplies_by_its_trits_and_survives_zeros(code: str, per: str) -> None:
    config = QuantizeConfig.model_validate({"weights": code, "scale_per": per, "activations": "none"})
    layer = QuantizedLinear(6, 5, config)
    x = random_weight(1, 1.0, 4, 6)
    torch.testing.assert_close(layer(x), x @ layer.ternary().dequantized().T)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()
    with torch.no_grad():
        layer.weight.zero_()
    layer.fit_step()
    assert layer(x).abs().max() == 0


def test_weights_are_quantised_when_they_change_and_only_then() -> None:
    layer = QuantizedLinear(6, 5, QuantizeConfig())
    first = layer.ternary()
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.ternary() is first
    with torch.no_grad():
        layer.weight.mul_(-1)
    assert torch.equal(layer.ternary().trits_OI, -first.trits_OI)
    layer.load_state_dict({"weight": torch.ones(5, 6)})
    assert torch.equal(layer.ternary().dequantized(), torch.ones(5, 6))


def test_what_was_quantised_is_forgotten_when_the_weights_move_and_serves_training_after_inference() -> None:
    layer = QuantizedLinear(6, 5, QuantizeConfig())
    first = layer.ternary()
    layer.to(torch.float64)
    assert layer.ternary() is not first
    layer.to(torch.float32)
    with torch.inference_mode():
        layer(torch.randn(2, 6))
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (2, 3, 6)])
def test_inputs_are_of_any_shape(shape: tuple[int, ...]) -> None:
    for config in (QuantizeConfig(), QuantizeConfig(weights="none"), QuantizeConfig(activations="none")):
        layer = QuantizedLinear(6, 5, config)
        assert layer(torch.randn(shape)).shape == (*shape[:-1], 5)


def test_layers_are_named_by_patterns_and_the_head_can_be_one() -> None:
    config = QuantizeConfig(layers=("model.layers.1.mlp.*", "*.[qk]_proj", "lm_head"))
    model = Transformer(SHAPE, 40, config)
    model.initialize(torch.Generator().manual_seed(0))
    assert list(model.quantized_linears()) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    ]
    assert len(model.head_weight.unique()) == 3
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model.lm_head(model.model(ids, ()).final_BTD), model.logits(ids))


def test_patterns_that_name_nothing_and_rows_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(
        StageError, match=r"quantize.layers: found 'model.layer.\*', which names no linear layer; there"
    ):
        Transformer(SHAPE, 40, QuantizeConfig(layers=("model.layers.*", "model.layer.*")))
    with pytest.raises(
        StageError,
        match=r"found rows of 16 weights in model.layers.1.mlp.up_proj.*multiple of 128; the next that serve: 128; student.*24",
    ):
        Transformer(SHAPE, 40, QuantizeConfig(scale_per="group-128"))
    with pytest.raises(ValueError, match=r"scale_per = 'row' belongs to the ternary codes, and found weights = 'none'"):
        QuantizeConfig(weights="none", scale_per="row")
    with pytest.raises(ValueError, match=r"the step of weights = 'seq' is learned per tensor or per row"):
        QuantizeConfig(weights="seq", scale_per="group-128")
