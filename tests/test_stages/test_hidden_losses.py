"""Losses on hidden states and on attention relations against slow references; which layers and outputs they compare."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tristill.stages.losses.hidden import HiddenLoss
from tristill.stages.losses.hidden_config import HiddenLossConfig, RelationsConfig, resolved_layers
from tristill.stages.losses.relations import RelationLoss, Widths, relation_divergence
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.language_model import State
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.config import QuantizeConfig


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normalised(x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((a - mean) ** 2 for a in x) / len(x)
    return [(a - mean) / math.sqrt(variance + 1e-5) for a in x]


def distance(kind: str, s: list[float], t: list[float]) -> float:
    if kind == "mse":
        return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)
    if kind == "l2":
        return math.sqrt(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)))
    return 1 - sum(a * b for a, b in zip(s, t, strict=True)) / math.hypot(*s) / math.hypot(*t)


@pytest.mark.parametrize("kind", ["mse", "cosine", "l2"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("width", [4, 6])
def test_hidden_losses_are_means_over_layers_and_positions(kind: str, normalise: bool, width: int) -> None:
    config = HiddenLossConfig.model_validate({"kind": kind, "normalise": normalise, "layers": {1: 2, 3: 4}})
    loss = HiddenLoss(config, {1: 2, 3: 4}, student_width=width, teacher_width=6)
    assert len(loss.projections) == (0 if width == 6 else 2), "a projection only where the widths differ"
    student = {State("residual", layer): normal(layer, 2, 5, width) for layer in (1, 3)}
    teacher = {State("residual", layer): normal(layer, 2, 5, 6) for layer in (2, 4)}
    expected = []
    for own, theirs in ((1, 2), (3, 4)):
        s = student["residual", own]
        if width != 6:
            s = s @ loss.projections[str(own)].detach().T
        for a, b in zip(s.flatten(0, 1).tolist(), teacher["residual", theirs].flatten(0, 1).tolist(), strict=True):
            if normalise:
                a, b = normalised(a), normalised(b)  # noqa: PLW2901
            expected.append(distance(kind, a, b))
    found = loss(student, teacher)
    assert float(found.detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from(["mse", "cosine", "l2"]), st.booleans(), st.floats(0, 1e4))
def test_hidden_losses_are_never_negative_zero_at_equality_and_have_finite_gradients(
    seed: int, kind: str, normalise: bool, scale: float
) -> None:
    config = HiddenLossConfig.model_validate({"kind": kind, "normalise": normalise, "layers": {1: 1}})
    loss = HiddenLoss(config, {1: 1}, 6, 6)
    state = State("residual", 1)
    student, teacher = (normal(seed + n, 1, 3, 6) * scale for n in (0, 1))
    assert float(loss({state: student}, {state: teacher})) >= 0
    same = teacher.clone().requires_grad_()
    value = loss({state: same}, {state: teacher})
    value.backward()
    if scale > 1e-2:
        assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert same.grad is not None
    assert same.grad.isfinite().all()


def test_a_projection_is_learned_and_starts_as_the_identity() -> None:
    config = HiddenLossConfig.model_validate({"layers": {1: 1}, "projection": "always"})
    loss = HiddenLoss(config, {1: 1}, 6, 6)
    state = State("residual", 1)
    assert float(loss({state: normal(0, 1, 3, 6)}, {state: normal(0, 1, 3, 6)}).detach()) == 0
    loss({state: normal(0, 1, 3, 6)}, {state: normal(1, 1, 3, 6)}).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())


@pytest.mark.parametrize(
    ("layers", "depth", "known", "expected"),
    [
        ({2: 5}, 3, (1, 5), {2: 5}),
        ("all", 3, (1, 2, 3), {1: 1, 2: 2, 3: 3}),
        ("uniform", 3, (1, 2, 3), {1: 1, 2: 2, 3: 3}),
        ("uniform", 2, (1, 2, 3, 4), {1: 2, 2: 4}),
        ("uniform", 3, tuple(range(1, 13)), {1: 4, 2: 8, 3: 12}),
        ("uniform", 4, (0, 6, 12), {1: 6, 2: 6, 3: 12, 4: 12}),
    ],
)
def test_layer_maps_are_resolved(layers: object, depth: int, known: tuple[int, ...], expected: dict[int, int]) -> None:
    assert resolved_layers(layers, depth, known) == expected  # type: ignore[arg-type]


def relations(x: list[list[float]], heads: int, i: int, head: int) -> list[float]:
    """softmax over j <= i of x_i x_j / sqrt(E) in one relation head."""
    width = len(x[0]) // heads
    part = [row[head * width : (head + 1) * width] for row in x]
    scores = [sum(a * b for a, b in zip(part[i], part[j], strict=True)) / math.sqrt(width) for j in range(i + 1)]
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def test_relations_are_causal_softmaxes_of_scaled_products() -> None:
    student, teacher = normal(0, 1, 4, 6), normal(1, 1, 4, 8)
    expected = []
    for head in range(2):
        for i in range(4):
            r_s, r_t = (relations(x[0].tolist(), 2, i, head) for x in (student, teacher))
            expected.append(sum(t * math.log(t / s) for s, t in zip(r_s, r_t, strict=True)))
    found = relation_divergence(student, teacher, 2)
    assert float(found) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_padding_is_neither_counted_nor_related_to() -> None:
    student, teacher = normal(0, 2, 5, 6).requires_grad_(), normal(1, 2, 5, 6)
    is_padding = torch.tensor([[False, False, False, True, True], [True, False, False, False, False]])
    found = relation_divergence(student, teacher, 3, is_padding)
    kept = [
        relation_divergence(student[:1, :3], teacher[:1, :3], 3),
        relation_divergence(student[1:, 1:], teacher[1:, 1:], 3),
    ]
    assert float(found.detach()) == pytest.approx(float((3 * kept[0] + 4 * kept[1]).detach()) / 7, rel=1e-4)
    found.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad[is_padding] == 0).all()


def test_relations_of_queries_keys_and_values_count_alike() -> None:
    own, theirs = Widths(6, 2), Widths(8, 4)
    loss = RelationLoss(RelationsConfig(layers={1: 2}, heads=2), {1: 2}, own, theirs)
    student, teacher = normal(0, 2, 4, 10), normal(1, 2, 4, 16)
    parts = [
        relation_divergence(student[..., a:b], teacher[..., c:d], 2)
        for a, b, c, d in ((0, 6, 0, 8), (6, 8, 8, 12), (8, 10, 12, 16))
    ]
    found = loss({State("qkv", 1): student}, {State("qkv", 2): teacher})
    torch.testing.assert_close(found, sum(parts) / 3)
    same = RelationLoss(RelationsConfig(layers={1: 1}, heads=2), {1: 1}, own, own)
    assert float(same({State("qkv", 1): student}, {State("qkv", 1): student})) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("quantize", [None, QuantizeConfig()])
def test_outputs_of_a_block_are_what_it_adds_to_the_stream(quantize: QuantizeConfig | None) -> None:
    shape = ModelConfig(width=16, layers=2, heads=4, kv_heads=2, mlp_width=24)
    model = Transformer(shape, 30, quantize)
    model.initialize(torch.Generator().manual_seed(0))
    wanted = [State("residual", 0), *(State(o, n) for n in (1, 2) for o in ("residual", "attention", "mlp", "qkv"))]
    ids = torch.arange(14).view(2, 7)
    found = model(ids, wanted).hidden
    assert set(found) == set(wanted)
    for n in (1, 2):
        added = found[State("attention", n)] + found[State("mlp", n)]
        torch.testing.assert_close(found[State("residual", n)], found[State("residual", n - 1)] + added)
    attention = model.model.layers[1].self_attn
    x = model.model.layers[1].input_layernorm(found[State("residual", 1)])
    expected = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], dim=-1)
    torch.testing.assert_close(found[State("qkv", 2)], expected)
    assert found[State("qkv", 2)].shape == (2, 7, 16 + 8 + 8)
