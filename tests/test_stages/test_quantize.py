"""Quantisers: a contract that all keep, each against its formula in plain Python, and the layers that use them."""

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
from tristill.stages.quantize.activations import absmax_quantize
from tristill.stages.quantize.config import QUANTIZERS, QuantizeConfig
from tristill.stages.quantize.gradients import straight_through
from tristill.stages.quantize.learned import Learned, Seq
from tristill.stages.quantize.quantizer import Quantizer, ScalePer, TernaryWeight, blocks
from tristill.stages.quantize.ternary import Absmean, Twn

SEEDS = st.integers(0, 2**31)
SCALES = st.sampled_from([1e-3, 1.0, 1e4])
PER: tuple[ScalePer, ...] = ("tensor", "row", "group-128", "group-256")
SHAPE = ModelConfig(width=16, layers=2, heads=2, mlp_width=24)
ALL = [
    kind(per, 3 if kind.takes_bits else None)
    for kind in QUANTIZERS.values()
    for per in PER
    if (kind.is_ternary or per == "tensor") and not (kind.learns_step and per.startswith("group"))
]
all_quantizers = pytest.mark.parametrize("quantizer", ALL, ids=lambda q: f"{type(q).__name__}-{q.scale_per}")


def random_tensor(seed: int, scale: float, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def quantized(quantizer: Quantizer, weight: torch.Tensor, step: torch.Tensor | None) -> torch.Tensor:
    found = quantizer.quantize(weight, step)
    return found.dequantized() if isinstance(found, TernaryWeight) else found


@all_quantizers
@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, scale=SCALES)
def test_quantising_again_changes_no_sign_and_a_row_of_zeros_stays(
    quantizer: Quantizer, seed: int, scale: float
) -> None:
    weight = random_tensor(seed, scale, 3, 256)
    weight[1] = 0
    step = quantizer.initial_step(weight) if quantizer.learns_step else None
    once = quantized(quantizer, weight, step)
    again = quantized(quantizer, once, step)
    assert once[1].abs().max() == 0
    assert torch.equal(again.sign(), once.sign())
    if not isinstance(quantizer, Absmean):  # whose scale shrinks by the share of nonzeros
        torch.testing.assert_close(again, once, rtol=1e-6, atol=0)
    found = quantizer.quantize(weight, step)
    if isinstance(found, TernaryWeight):
        assert found.trits_OI.dtype == torch.int8
        assert set(found.trits_OI.unique().tolist()) <= {-1, 0, 1}
        assert (found.scale_RG > 0).all()
        assert found.scale_RG.numel() == quantizer.num_scales(*weight.shape)
        is_kept = blocks(weight.abs(), quantizer.scale_per) > found.threshold[..., None]
        if quantizer.scale_per != "tensor" and isinstance(quantizer, Absmean | Twn):
            assert torch.equal(is_kept.reshape(weight.shape), found.trits_OI != 0)


@all_quantizers
def test_a_layer_multiplies_by_the_values_of_its_quantizer_and_gradients_pass(quantizer: Quantizer) -> None:
    code = next(name for name, kind in QUANTIZERS.items() if kind is type(quantizer))
    config = QuantizeConfig.model_validate(
        {"weights": code, "scale_per": quantizer.scale_per, "bits": quantizer.bits, "activations": "none"}
    )
    layer = QuantizedLinear(256, 5, config)
    assert [name for name, _ in layer.named_parameters()] == ["weight", *["log_step"] * quantizer.learns_step]
    x, upstream = random_tensor(1, 1.0, 4, 256), random_tensor(2, 1.0, 4, 5)
    step = None if layer.log_step is None else layer.log_step.detach().exp().reshape(-1, 1)
    torch.testing.assert_close(layer(x), x @ quantized(quantizer, layer.weight.detach(), step).T)
    layer(x).backward(upstream)
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()
    if not quantizer.learns_step:
        torch.testing.assert_close(layer.weight.grad, upstream.T @ x)
    with torch.no_grad():
        layer.weight.zero_()
    layer.fit_step()
    assert layer(x).abs().max() == 0


def plain_blocks(weight: torch.Tensor, per: ScalePer) -> Iterator[list[tuple[int, int]]]:
    """Indices of the weights that share a scale, as the words of the config say it."""
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
@pytest.mark.parametrize(("kind", "plain"), [(Absmean, plain_absmean), (Twn, plain_twn)])
@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, scale=SCALES)
def test_a_computed_scale_is_its_formula_in_every_block(
    per: ScalePer, kind: type[Quantizer], plain: Callable[[list[float]], list[float]], seed: int, scale: float
) -> None:
    weight = random_tensor(seed, scale, 2, 512)
    expected = torch.zeros_like(weight)
    for indices in plain_blocks(weight, per):
        for index, value in zip(indices, plain([float(weight[i]) for i in indices]), strict=True):
            expected[index] = value
    torch.testing.assert_close(quantized(kind(per), weight, None), expected, rtol=1e-5, atol=0)


@settings(deadline=None)
@example(seed=0, scale=1.0, ratio=3.0, per="row")  # 1.5 times the largest over its step: between two levels
@given(seed=SEEDS, scale=SCALES, ratio=st.floats(0.05, 20), per=st.sampled_from(["tensor", "row"]))
def test_learned_and_seq_are_their_formulas(seed: int, scale: float, ratio: float, per: ScalePer) -> None:
    weight = random_tensor(seed, scale, 4, 9)
    step, wide = Learned(per).initial_step(weight) * ratio, Seq(per).initial_step(weight) * ratio
    learned, seq = Learned(per).quantize(weight, step), Seq(per).quantize(weight, wide)
    # The nearest whole number; between two, float32's quotient may fall on either side.
    assert ((learned.trits_OI - (weight / step).clamp(-1, 1)).abs() <= 0.5 + 1e-6).all()
    assert ((seq.trits_OI - 1.5 * (weight / wide).clamp(-0.99, 0.99)).abs() <= 0.5 + 1e-6).all()
    torch.testing.assert_close(seq.dequantized(), seq.trits_OI * wide * (2 / 3))


def test_seq_starts_with_the_largest_weight_on_the_border_of_its_range() -> None:
    weight = torch.tensor([[0.1, -0.5, 0.3], [2.0, 1.0, 0.0]])
    assert Seq("row").initial_step(weight).tolist() == [[0.5], [2.0]]
    assert Seq().initial_step(weight).tolist() == [[2.0]]
    assert Seq("row").quantize(weight, Seq("row").initial_step(weight)).trits_OI.tolist() == [[0, -1, 1], [1, 1, 0]]


@settings(deadline=None)
@given(SEEDS, st.floats(0.1, 10))
def test_a_step_per_row_has_the_gradients_of_its_row(seed: int, ratio: float) -> None:
    """W_q = step q(W / step): the weight's passes inside, the step's is q - x inside and q outside, over sqrt(N)."""
    weight = random_tensor(seed, 1.0, 3, 8).double().requires_grad_()
    upstream = random_tensor(seed + 1, 1.0, 3, 8).double()
    seq = Seq("row")
    step = (seq.initial_step(weight.detach()) * ratio).requires_grad_()
    values = seq.quantize(weight.detach(), step.detach()).dequantized().double()
    seq.with_gradient(weight, values, step).backward(upstream)
    for row in range(3):
        slope_sum = 0.0
        for column in range(8):
            x = float(weight.detach()[row, column] / step.detach()[row, 0])
            q = round(1.5 * max(-0.99, min(0.99, x))) / 1.5
            inside = abs(x) < 1
            slope_sum += float(upstream[row, column]) * (q - x if inside else q)
            assert float(cast("torch.Tensor", weight.grad)[row, column]) == float(upstream[row, column]) * inside
        assert float(cast("torch.Tensor", step.grad)[row, 0]) == pytest.approx(slope_sum / math.sqrt(24), rel=1e-5)


@settings(deadline=None)
@given(SEEDS, SCALES)
def test_absmax_is_the_papers_formula_and_idempotent_and_passes_gradients(seed: int, scale: float) -> None:
    x = random_tensor(seed, scale, 3, 11)
    s = 127 / x.abs().amax(dim=-1, keepdim=True)
    found = absmax_quantize(x)
    torch.testing.assert_close(found, (x * s).round() / s)
    torch.testing.assert_close(absmax_quantize(found), found)
    assert absmax_quantize(torch.zeros(2, 4)).abs().max() == 0
    upstream = random_tensor(seed + 1, 1.0, 3, 11)
    straight_through(x.requires_grad_(), found).backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("weights", ["absmean", "none"])
@pytest.mark.parametrize("activations", ["absmax-int8", "none"])
def test_quantized_linear_quantises_what_it_says(weights: str, activations: str) -> None:
    layer = QuantizedLinear(6, 5, QuantizeConfig.model_validate({"weights": weights, "activations": activations}))
    x = random_tensor(3, 1.0, 2, 6).requires_grad_()
    w_used = layer.weight.detach() if weights == "none" else quantized(Absmean(), layer.weight.detach(), None)
    x_used = absmax_quantize(x.detach()) if activations == "absmax-int8" else x.detach()
    y = layer(x)
    torch.testing.assert_close(y, x_used @ w_used.T)
    upstream = random_tensor(4, 1.0, 2, 5)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ w_used)
    torch.testing.assert_close(layer.weight.grad, upstream.T @ x_used)
    for shape in ((6,), (0, 6), (2, 0, 6), (2, 3, 6)):
        assert layer(torch.randn(shape)).shape == (*shape[:-1], 5)


def test_weights_are_quantised_when_they_change_or_move_and_only_then() -> None:
    layer = QuantizedLinear(6, 5, QuantizeConfig())
    first = layer.ternary()
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.ternary() is first
    layer.to(torch.float64)
    assert layer.ternary() is not first
    layer.to(torch.float32)
    with torch.no_grad():
        layer.weight.mul_(-1)
    assert torch.equal(layer.ternary().trits_OI, -first.trits_OI)
    layer.load_state_dict({"weight": torch.ones(5, 6)})
    with torch.inference_mode():
        layer(torch.randn(2, 6))
    assert torch.equal(layer.ternary().dequantized(), torch.ones(5, 6))
    layer(torch.randn(2, 6)).sum().backward()  # what was made for inference serves training


def test_layers_are_named_by_patterns_and_the_head_can_be_one() -> None:
    config = QuantizeConfig(layers=("model.layers.1.mlp.*", "*.[qk]_proj", "lm_head"))
    model = Transformer(SHAPE, 40, config)
    model.initialize(torch.Generator().manual_seed(0))
    attention = [f"model.layers.{n}.self_attn.{part}_proj" for n in (0, 1) for part in "qk"]
    mlp = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert list(model.quantized_linears()) == [*attention, *mlp, "lm_head"]
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "none", "scale_per": "row"}, "scale_per = 'row' belongs to the ternary codes, and found weights"),
        ({"weights": "seq", "scale_per": "group-128"}, "the step of weights = 'seq' is learned per tensor or per row"),
        ({"weights": "absmean", "bits": 4}, "bits = 4 belongs to the nbit codes, and found weights = 'absmean'; leave"),
        ({"weights": "none", "bits": 4}, "bits = 4 belongs to the nbit codes, and found weights = 'none'; leave b"),
        ({"weights": "nbit"}, "weights = 'nbit' needs bits, and found none; set bits to 2..8"),
        ({"weights": "nbit-diffused", "bits": 1}, r"bits\n  Input should be greater than or equal to 2"),
        ({"weights": "nbit-learned", "bits": 9}, r"bits\n  Input should be less than or equal to 8"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeConfig.model_validate(settings)
