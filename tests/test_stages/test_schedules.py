"""Weights and temperatures that change, positions and windows that are picked, terms that are balanced."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tristill.cache.order import Pacing, WindowOrder
from tristill.cache.profiles.profile import Need
from tristill.stages.distill.balance import Balance, FaintTerms
from tristill.stages.distill.curriculum import share_seen
from tristill.stages.distill.scheduled_terms import ScheduledTerms
from tristill.stages.losses.chunked_head import chunked_head_loss
from tristill.stages.losses.config import LossConfig
from tristill.stages.losses.mining import hardest
from tristill.stages.losses.schedule import AdaptiveTemperature, value_at
from tristill.stages.losses.selection_config import BalanceConfig, CurriculumConfig, MiningConfig, OnlineConfig
from tristill.stages.losses.target import ComputedTargets


def config(**changes: object) -> LossConfig:
    return LossConfig.model_validate(changes)


def weights(changes: dict[str, object], steps: int) -> list[dict[str, float]]:
    terms = ScheduledTerms(config(**changes), steps, 1.0)
    return [{term.name: term.weight for term in terms.at(step)} for step in range(steps)]


def test_alpha_follows_its_schedule_and_the_other_share_its_complement() -> None:
    linear = weights({"alpha": {"kind": "linear", "start": 1.0, "end": 0.0}}, 5)
    assert linear[0] == {"cross_entropy": 1.0}, "a term of weight zero is left out"
    assert linear[1] == {"cross_entropy": 0.75, "forward_kl": 0.25}
    assert linear[4] == {"forward_kl": 1.0}
    cosine = weights({"alpha": {"kind": "cosine", "start": 0.8, "end": 0.2, "until": 0.5}}, 5)
    assert [step["cross_entropy"] for step in cosine] == pytest.approx([0.8, 0.5, 0.2, 0.2, 0.2])
    stepped = weights({"alpha": {"kind": "step", "values": [0.9, 0.3], "milestones": [0.5]}}, 4)
    assert [step["cross_entropy"] for step in stepped] == pytest.approx([0.9, 0.9, 0.3, 0.3])


def test_a_temperature_schedule_moves_tau_and_its_square() -> None:
    terms = ScheduledTerms(config(alpha=0.5, temperature={"kind": "linear", "start": 5.0, "end": 1.0}), 3, 1.0)
    found = [terms.at(step)[1] for step in range(3)]
    assert [term.term.temperature for term in found] == [5.0, 3.0, 1.0]  # type: ignore[attr-defined]
    assert [term.weight for term in found] == [12.5, 4.5, 0.5]
    assert terms.temperatures(1) == {"forward_kl": 3.0}


def test_total_variation_takes_tau_and_losses_of_order_take_none() -> None:
    losses = [
        {"kind": "total_variation", "temperature": 3.0, "weight": 0.5},
        {"kind": "ranking", "weight": 2.0},
        {"kind": "reverse_kl", "temperature": 3.0},
        {"kind": "forward_kl"},
        {"kind": "forward_kl", "temperature": 4.0},
    ]
    terms = ScheduledTerms(config(losses=losses), 1, 2.0)
    assert {term.name: term.weight for term in terms.at(0)} == {
        "total_variation": 1.5,
        "ranking": 2.0,
        "reverse_kl": 9.0,
        "forward_kl_1": 4.0,
        "forward_kl_2": 16.0,
    }


def test_an_adaptive_temperature_falls_after_patience_and_its_state_is_kept() -> None:
    adaptive = {"kind": "adaptive", "start": 4.0, "factor": 0.5, "lowest": 1.5, "bound_nats": 0.3, "patience": 2}
    settings_ = config(alpha=0.5, temperature=adaptive)
    terms = ScheduledTerms(settings_, 9, 1.0)
    seen = []
    for step, value in enumerate([0.2, 0.4, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1]):
        seen.append(terms.temperatures(step)["forward_kl"])
        terms.observe({"forward_kl": torch.tensor(value), "cross_entropy": torch.tensor(0.0)})
        resumed = ScheduledTerms(settings_, 9, 1.0)
        resumed.load_state_dict(terms.state_dict())
        terms = resumed
    assert seen == [4.0, 4.0, 4.0, 4.0, 2.0, 2.0, 1.5, 1.5]
    assert AdaptiveTemperature.model_validate(adaptive).after(4.0, 1, 0.3) == (4.0, 0), "at the bound is not under it"


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, [Need("forward_kl", 2.0)]),
        ({"alpha": 1.0}, []),
        ({"alpha": {"kind": "linear", "start": 1.0, "end": 0.5}, "temperature": 3.0}, [Need("forward_kl", 3.0)]),
        ({"temperature": {"kind": "cosine", "start": 5.0, "end": 1.0}}, [Need("forward_kl", 5.0, 1.0)]),
        (
            {"temperature": {"kind": "step", "values": [5.0, 1.0], "milestones": [0.5]}, "tail": "bucket"},
            [Need("forward_kl", 5.0, None, "bucket"), Need("forward_kl", 1.0, None, "bucket")],
        ),
        ({"temperature": {"kind": "adaptive", "start": 4.0, "bound_nats": 1.0}}, [Need("forward_kl", 4.0, 1.0)]),
        (
            {"losses": [{"kind": "decoupled_kd"}, {"kind": "ranking", "weight": 0}]},
            [Need("decoupled_kd of labels", 2.0)],
        ),
        ({"alpha": 1.0, "mining": {"fraction": 0.5, "by": "divergence"}}, [Need("mining by divergence", 2.0)]),
    ],
)
def test_needs_are_those_of_every_temperature_that_comes_up(changes: dict[str, object], needs: list[Need]) -> None:
    assert list(config(**changes).needs(2.0)) == needs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [{"kind": "forward_kl"}], "alpha": 0.5}, "give either losses, or alpha and temperature"),
        ({"losses": [{"kind": "forward_kl", "weight": 0}]}, "every weight is 0"),
        ({"alpha": {"kind": "linear", "start": 0.5, "end": 1.5}}, "alpha must stay between 0 and 1"),
        ({"temperature": {"kind": "linear", "start": 2.0, "end": 0.0}}, "a temperature must stay above 0"),
        ({"alpha": {"kind": "step", "values": [0.5], "milestones": [0.5]}}, "at least 2 items"),
        ({"alpha": {"kind": "step", "values": [0.5, 1], "milestones": [0.5, 0.7]}}, "one value more than those"),
        ({"alpha": {"kind": "adaptive", "start": 1, "bound_nats": 1}}, "a table whose kind is that of a schedule"),
        ({"temperature": {"kind": "adaptive", "start": 1, "lowest": 2, "bound_nats": 1}}, r"lowest \(2\) must not"),
        ({"hidden": {"layers": {}}}, "at least one pair of layers"),
        ({"relations": {"layers": {}, "heads": 2}}, "at least one pair of layers"),
        ({"alpha": 1.0, "entropy_weights": {"power": 1}}, "count in terms that need the teacher's distribution"),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give co_train or ema"),
        ({"ema": 0.9}, "a frozen teacher has no moving average"),
        ({"co_train": True, "ema": 0.9, "ema_of": "student"}, "excludes co_train"),
        ({"co_train": True, "ema_of": "student"}, "needs ema"),
    ],
)
def test_teachers_that_cannot_move_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OnlineConfig.model_validate(changes)


@pytest.mark.parametrize("by", ["loss", "entropy", "divergence"])
def test_mining_keeps_the_hardest_share(by: str) -> None:
    generator = torch.Generator().manual_seed(0)
    final, head = torch.randn(700, 5, generator=generator), torch.randn(11, 5, generator=generator)
    labels = torch.randint(0, 11, (700,), generator=generator)
    teacher = ComputedTargets(torch.randn(700, 5, generator=generator), torch.randn(11, 5, generator=generator))
    kept = hardest(final, head, labels, teacher, MiningConfig.model_validate({"fraction": 0.3, "by": by}), 2.0)
    log_q = torch.log_softmax(final @ head.T, -1)
    log_p2, log_q2 = (torch.log_softmax(z / 2, -1) for z in (teacher.final_ND @ teacher.head_VD.T, final @ head.T))
    scores = {
        "loss": -log_q.gather(-1, labels[:, None])[:, 0],
        "entropy": -(log_q.exp() * log_q).sum(-1),
        "divergence": (log_p2.exp() * (log_p2 - log_q2)).sum(-1),
    }[by]
    assert kept.tolist() == sorted(scores.topk(210).indices.tolist())


def test_position_weights_count_in_terms_of_the_teacher_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    final = torch.randn(30, 5, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (30,), generator=generator)
    teacher = ComputedTargets(torch.randn(30, 5, generator=generator).double(), torch.randn(11, 5).double())
    weights_N = torch.rand(30, generator=generator, dtype=torch.float64) * 2
    terms = ScheduledTerms(config(alpha=0.3), 1, 1.0).at(0)
    values = chunked_head_loss(final, head, labels, teacher, terms, weights_N)
    values.total.backward()
    z = final.detach().clone().requires_grad_()
    log_q = torch.log_softmax(z @ head.T, -1)
    log_p = teacher.chunk(slice(None), torch.float64).log_probs(1.0).double()
    kl = ((log_p.exp() * (log_p - log_q)).sum(-1) * weights_N).mean()
    expected = 0.3 * torch.nn.functional.nll_loss(log_q, labels) + 0.7 * kl
    expected.backward()
    torch.testing.assert_close(values.total, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(final.grad, z.grad, rtol=1e-4, atol=1e-6)


def paced_reference(order: list[int], pacing: Pacing, batches: int) -> list[int]:
    """One window after the other."""
    seen: list[int] = []
    for window in order:
        batch = pacing.batches_before + len(seen) // pacing.batch_windows
        allowed = max(pacing.batch_windows, math.ceil(pacing.share(batch) * len(pacing.rank_W)))
        if pacing.rank_W[window] < allowed:
            seen.append(window)
    return seen[: batches * pacing.batch_windows]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 300), st.integers(1, 9), st.integers(0, 20), st.integers(1, 7))
def test_a_paced_order_leaves_out_what_is_too_hard_yet(
    seed: int, num_windows: int, batch_windows: int, before: int, per_block: int
) -> None:
    rank = np.random.default_rng(seed).permutation(num_windows)
    pacing = Pacing(rank, lambda batch: min(1.0, 0.2 + batch / 20), batch_windows, before)
    plain = list(WindowOrder(num_windows, per_block, 3 * per_block, seed, 1).windows())
    order = WindowOrder(num_windows, per_block, 3 * per_block, seed, 1, pacing)
    found = list(order.windows())
    assert found == paced_reference(plain, pacing, num_windows)
    assert order.num_windows == len(found)
    start = len(found) // 2
    assert list(order.windows(start)) == found[start:]
    for _, group in order.groups():
        assert set(group.blocks.tolist()) == {window // per_block for window in group.windows.tolist()}
    whole = WindowOrder(
        num_windows, per_block, 3 * per_block, seed, 1, Pacing(rank, lambda _: 1.0, batch_windows, before)
    )
    assert list(whole.windows()) == plain


@pytest.mark.parametrize(
    ("pacing", "shares"),
    [
        ("linear", [0.2, 0.6, 1.0, 1.0]),
        ("root", [0.2, math.sqrt(0.52), 1.0, 1.0]),
        ("step", [0.2, 0.52, 1.0, 1.0]),
    ],
)
def test_the_share_of_windows_grows_as_paced(pacing: str, shares: list[float]) -> None:
    curriculum = CurriculumConfig.model_validate({"pacing": pacing, "start": 0.2, "until": 0.5})
    assert [share_seen(curriculum, progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(shares)


def test_balance_makes_the_gradients_norms_as_the_weights_are() -> None:
    balance = Balance(BalanceConfig(every=5, smoothing=0.5), ["a", "b"])
    assert [balance.is_due(step) for step in (0, 4, 5)] == [True, False, True]
    given_weights, norms = {"a": 0.2, "b": 0.8}, {"a": 10.0, "b": 0.1}
    balance.observe(given_weights, norms)
    size = {label: given_weights[label] * balance.factor(label) * norms[label] for label in norms}
    assert size["b"] / size["a"] == pytest.approx(4.0)
    assert sum(size.values()) == pytest.approx(0.2 * 10 + 0.8 * 0.1), "the total stays as it was"
    before = balance.factor("a")
    balance.observe(given_weights, {"a": 10.0, "b": 10.0})
    assert balance.factor("a") == pytest.approx(math.sqrt(before * 1.0)), "half of the old logarithm, half of the new"


def test_without_a_term_the_head_gives_zero_and_no_gradient() -> None:
    final = torch.randn(3, 5).requires_grad_()
    values = chunked_head_loss(final, torch.randn(7, 5), torch.zeros(3).long(), None, [])
    values.total.backward()
    assert (float(values.total.detach()), values.terms) == (0.0, {})
    assert final.grad is not None
    assert (final.grad == 0).all()


def test_faint_terms_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    faint = FaintTerms()
    for _ in range(2):
        faint.look({"cross_entropy": 1.0, "hidden_mse": 5e-4, "forward_kl": 2e-3})
    said = capsys.readouterr().err
    assert said.count("less than a thousandth") == 1
    assert "hidden_mse" in said


def test_values_between_milestones_are_functions_of_the_step_alone() -> None:
    setting = config(alpha={"kind": "step", "values": [0.1, 0.2, 0.3], "milestones": [0.0, 1.0]}).alpha
    assert [value_at(setting, step, 3) for step in range(3)] == [0.2, 0.2, 0.3]  # type: ignore[arg-type]
