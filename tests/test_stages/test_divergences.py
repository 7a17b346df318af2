"""Every term on distributions against a slow float64 reference, on every kind of target; gradients by gradcheck."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tristill.stages.losses.build import make_term
from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import (
    HeadTarget,
    LogitsTarget,
    PartialTarget,
    RenormalisedTarget,
    SpreadTarget,
    Target,
)
from tristill.stages.losses.term import DistributionTerm
from tristill.stages.losses.terms_config import AnyTerm

Distribution = list[float]
Reference = Callable[[Distribution, Distribution, int], float]
"""Of p and q over cells, and the cell of the label, in plain Python."""
_SETTINGS: TypeAdapter[AnyTerm] = TypeAdapter(AnyTerm)


def kl(p: Distribution, q: Distribution) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mixture(p: Distribution, share: float, q: Distribution) -> Distribution:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def adaptive(p: Distribution, q: Distribution, head_mass: float, num_entries: int) -> float:
    head: set[int] = set()
    for i in sorted(range(num_entries), key=lambda i: -p[i]):
        if sum(p[j] for j in head) < head_mass:
            head.add(i)
    gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
    share = sum(gaps[i] for i in head) / sum(gaps)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def decoupled(p: Distribution, q: Distribution, t: int, alpha: float, beta: float) -> float:
    rest_p, rest_q = ([x for i, x in enumerate(d) if i != t] for d in (p, q))
    binary = kl([p[t], sum(rest_p)], [q[t], sum(rest_q)])
    return alpha * binary + beta * kl([x / sum(rest_p) for x in rest_p], [x / sum(rest_q) for x in rest_q])


TERMS: dict[str, tuple[dict[str, Any], Reference]] = {
    "forward_kl": ({}, lambda p, q, _: kl(p, q)),
    "reverse_kl": ({}, lambda p, q, _: kl(q, p)),
    "jensen_shannon": (
        {"beta": 0.3},
        lambda p, q, _: 0.3 * kl(p, mixture(p, 0.3, q)) + 0.7 * kl(q, mixture(p, 0.3, q)),
    ),
    "skew_forward_kl": ({"skew": 0.2}, lambda p, q, _: kl(p, mixture(p, 0.2, q))),
    "skew_reverse_kl": ({"skew": 0.2}, lambda p, q, _: kl(q, mixture(p, 0.8, q))),
    "total_variation": ({}, lambda p, q, _: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2),
}


def term_of(kind: str, tau: float, **changes: Any) -> DistributionTerm:
    return make_term(_SETTINGS.validate_python({"kind": kind, **changes}), tau)


def normal(seed: int, *shape: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def softmax(logits: list[float], tau: float) -> Distribution:
    total = sum(math.exp(z / tau) for z in logits)
    return [math.exp(z / tau) / total for z in logits]


def head_of(teacher_NV: torch.Tensor, top_k: int, tau: float) -> HeadTarget:
    """The largest entries, every second row one fewer of them, and the tail's mass at tau, in float64."""
    top = teacher_NV.topk(top_k)
    relative = teacher_NV - top.values[:, :1]
    logits = top.values - top.values[:, :1]
    ids = top.indices.clone()
    if top_k > 1:
        logits[::2, -1], ids[::2, -1] = -torch.inf, ids[::2, 0]
    outside = (relative / tau).scatter(-1, ids, -torch.inf)
    tail = outside.logsumexp(-1, keepdim=True)
    return HeadTarget(ids, logits / tau, tail, (tau,))


def cells(head: HeadTarget, row: int, logits: list[float], tau: float) -> Distribution:
    """Probabilities of the entries that are there, then of all other ids."""
    p = softmax(logits, tau)
    ids = [int(i) for i, z in zip(head.head_ids_NK[row], head.head_logits_NK[row], strict=True) if math.isfinite(z)]
    return [*(p[i] for i in ids), sum(x for i, x in enumerate(p) if i not in ids)]


class Term(torch.autograd.Function):
    """A term whose closed-form gradient autograd can be compared with."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, term: DistributionTerm, labels_N: torch.Tensor, target: Target
    ) -> Any:
        student = StudentChunk(logits_NV.detach(), wants_gradient=True)
        value_N = term.per_position(student, labels_N, target)
        ctx.save_for_backward(student.gradient())
        return value_N

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.saved_tensors[0] * gradients[0][:, None], None, None, None


def value(term: DistributionTerm, student_NV: torch.Tensor, target: Target) -> torch.Tensor:
    labels_N = torch.arange(len(student_NV)) % student_NV.shape[1]
    return Term.apply(student_NV, term, labels_N, target)  # type: ignore[no-untyped-call,no-any-return]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(3, 12), st.sampled_from([0.5, 1.0, 5.0]), st.sampled_from(sorted(TERMS)))
def test_divergences_are_those_of_the_papers(seed: int, vocab: int, tau: float, kind: str) -> None:
    changes, reference = TERMS[kind]
    teacher, student = normal(seed, 4, vocab), normal(seed + 1, 4, vocab)
    found = value(term_of(kind, tau, **changes), student, LogitsTarget(teacher))
    expected = [
        reference(softmax(t, tau), softmax(s, tau), 0) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**31),
    st.integers(3, 12),
    st.data(),
    st.sampled_from([0.5, 1.0, 5.0]),
    st.sampled_from(sorted(TERMS)),
)
def test_on_a_head_divergences_take_all_other_ids_for_one(
    seed: int, vocab: int, data: st.DataObject, tau: float, kind: str
) -> None:
    changes, reference = TERMS[kind]
    teacher, student = normal(seed, 4, vocab), normal(seed + 1, 4, vocab)
    head = head_of(teacher, data.draw(st.integers(1, vocab - 1)), tau)
    found = value(term_of(kind, tau, **changes), student, head)
    expected = [
        reference(cells(head, row, teacher[row].tolist(), tau), cells(head, row, student[row].tolist(), tau), 0)
        for row in range(4)
    ]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)
    whole = value(term_of(kind, tau, **changes), student, LogitsTarget(teacher))
    assert (found <= whole + 1e-9).all(), "one cell for many ids never shows more than those"


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_adaptive_kl_weighs_both_directions_by_where_the_gap_is(tau: float) -> None:
    teacher, student = normal(0, 6, 9), normal(1, 6, 9)
    found = value(term_of("adaptive_kl", tau, head_mass=0.6), student, LogitsTarget(teacher))
    head = head_of(teacher, 4, tau)
    on_head = value(term_of("adaptive_kl", tau, head_mass=0.6), student, head)
    for row in range(6):
        p, q = softmax(teacher[row].tolist(), tau), softmax(student[row].tolist(), tau)
        assert float(found[row]) == pytest.approx(adaptive(p, q, 0.6, 9), rel=1e-6)
        p, q = (cells(head, row, z[row].tolist(), tau) for z in (teacher, student))
        assert float(on_head[row]) == pytest.approx(adaptive(p, q, 0.6, len(p) - 1), rel=1e-6)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_decoupled_kd_splits_target_and_rest(tau: float) -> None:
    teacher, student = normal(0, 6, 9), normal(1, 6, 9)
    of_label = value(term_of("decoupled_kd", tau, alpha=0.7, beta=3.0), student, LogitsTarget(teacher))
    settings_of_top1 = {"alpha": 0.7, "beta": 3.0, "of": "top1"}
    of_top1 = value(term_of("decoupled_kd", tau, **settings_of_top1), student, LogitsTarget(teacher))
    head = head_of(teacher, 4, tau)
    on_head = value(term_of("decoupled_kd", tau, **settings_of_top1), student, head)
    for row in range(6):
        p, q = softmax(teacher[row].tolist(), tau), softmax(student[row].tolist(), tau)
        assert float(of_label[row]) == pytest.approx(decoupled(p, q, row, 0.7, 3.0), rel=1e-6)
        assert float(of_top1[row]) == pytest.approx(decoupled(p, q, p.index(max(p)), 0.7, 3.0), rel=1e-6)
        p, q = (cells(head, row, z[row].tolist(), tau) for z in (teacher, student))
        assert float(on_head[row]) == pytest.approx(decoupled(p, q, 0, 0.7, 3.0), rel=1e-6)


def test_logit_mse_is_the_variance_of_the_difference() -> None:
    teacher, student = normal(0, 5, 9), normal(1, 5, 9)
    for tau in (1.0, 3.0):
        found = value(term_of("logit_mse", tau), student, LogitsTarget(teacher))
        torch.testing.assert_close(found, (teacher - student).var(dim=-1, correction=0))
        head = head_of(teacher, 4, tau)
        on_head = value(term_of("logit_mse", tau), student, head)
        for row in range(5):
            ids = head.head_ids_NK[row][torch.isfinite(head.head_logits_NK[row])]
            expected = (teacher[row, ids] - student[row, ids]).var(correction=0)
            torch.testing.assert_close(on_head[row], expected)


def test_ranking_counts_pairs_of_the_teachers_largest() -> None:
    teacher, student = normal(0, 5, 9), normal(1, 5, 9)
    found = value(term_of("ranking", 1.0, entries=4), student, LogitsTarget(teacher))
    head = head_of(teacher, 4, 1.0)
    on_head = value(term_of("ranking", 1.0, entries=6), student, head)
    for row in range(5):
        ids = teacher[row].topk(4).indices.tolist()
        for result, chosen in ((found, ids), (on_head, ids[:3] if row % 2 == 0 else ids)):
            pairs = [(i, j) for a, i in enumerate(chosen) for j in chosen[a + 1 :]]
            losses = [math.log1p(math.exp(-float(student[row, i] - student[row, j]))) for i, j in pairs]
            assert float(result[row]) == pytest.approx(sum(losses) / len(pairs), rel=1e-6)


def test_the_hinge_wants_the_teachers_first_a_margin_above_all_others() -> None:
    teacher, student = normal(0, 40, 5), normal(1, 40, 5)
    found = value(term_of("top1_hinge", 1.0, margin=1.5), student, LogitsTarget(teacher))
    for row in range(40):
        first = int(teacher[row].argmax())
        rival = max(float(student[row, j]) for j in range(5) if j != first)
        assert float(found[row]) == pytest.approx(max(0.0, 1.5 - float(student[row, first]) + rival))
    assert (found == 0).any()


def test_a_zero_tail_keeps_the_heads_probabilities_and_a_renormalised_one_divides_them() -> None:
    teacher, student = normal(0, 4, 9), normal(1, 4, 9)
    head = head_of(teacher, 4, 1.0)
    for row in range(4):
        p, q = (cells(head, row, z[row].tolist(), 1.0)[:-1] for z in (teacher, student))
        zero = float(value(term_of("forward_kl", 1.0), student, PartialTarget(head))[row])
        assert zero == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-6)
        divided = float(value(term_of("forward_kl", 1.0), student, RenormalisedTarget(head))[row])
        assert divided == pytest.approx(kl([a / sum(p) for a in p], q), rel=1e-6)


EVERY = {
    **{kind: changes for kind, (changes, _) in TERMS.items()},
    "adaptive_kl": {},
    "decoupled_kd": {"of": "top1", "beta": 2.0},
    "logit_mse": {},
    "ranking": {"entries": 4},
    "top1_hinge": {"margin": 30.0},
}


def targets_of(kind: str, teacher_NV: torch.Tensor, tau: float) -> dict[str, Target]:
    head = head_of(teacher_NV, 4, tau)
    found: dict[str, Target] = {
        "whole": LogitsTarget(teacher_NV),
        "head": head,
        "uniform": SpreadTarget(head, teacher_NV.shape[1]),
    }
    if kind not in {"reverse_kl", "adaptive_kl"}:
        found["renormalised"] = RenormalisedTarget(head)
    if kind == "forward_kl":
        found["zero"] = PartialTarget(head)
    return found


@pytest.mark.parametrize("kind", sorted(EVERY.keys() - {"adaptive_kl"}))
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_closed_form_gradients_pass_gradcheck(kind: str, tau: float) -> None:
    teacher = normal(0, 3, 9)
    for name, target in targets_of(kind, teacher, tau).items():
        for confident in (False, True):
            student = (normal(1, 3, 9) + (6 * teacher if confident else 0)).requires_grad_()
            term = term_of(kind, tau, **EVERY[kind])
            assert torch.autograd.gradcheck(lambda z, t=term, y=target: value(t, z, y), (student,)), name


@pytest.mark.parametrize("top_k", [1, 2])
def test_decoupled_kd_of_a_renormalised_entry_compares_it_with_the_rest_alone(top_k: int) -> None:
    """One entry has all the mass: the others have no shares to compare. Rows of head_of have one or two entries."""
    teacher = normal(0, 4, 9)
    term, target = (
        term_of("decoupled_kd", 1.0, of="top1", alpha=1.0, beta=3.0),
        RenormalisedTarget(head_of(teacher, top_k, 1.0)),
    )
    student = normal(1, 4, 9).requires_grad_()
    found = value(term, student, target)
    for row in range(0, 4, 2 if top_k == 2 else 1):
        q = softmax(student[row].tolist(), 1.0)
        assert float(found[row].detach()) == pytest.approx(-math.log(q[int(teacher[row].argmax())]), rel=1e-6)
    assert torch.autograd.gradcheck(lambda z: value(term, z, target), (student,))


def test_decoupled_kd_of_labels_passes_gradcheck() -> None:
    term, target = term_of("decoupled_kd", 2.0, beta=2.0), LogitsTarget(normal(0, 3, 9))
    assert torch.autograd.gradcheck(lambda z: value(term, z, target), (normal(1, 3, 9).requires_grad_(),))


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_gradient_of_adaptive_kl_holds_its_shares_constant(tau: float) -> None:
    teacher = normal(0, 3, 9)
    for target in (LogitsTarget(teacher), head_of(teacher, 4, tau)):
        gradients = {}
        for kind in ("adaptive_kl", "forward_kl", "reverse_kl"):
            student = normal(1, 3, 9).requires_grad_()
            found = value(term_of(kind, tau), student, target)
            found.sum().backward()
            gradients[kind] = (found.detach(), student.grad)
        (mixed, slope), (forward, forward_slope), (reverse, reverse_slope) = gradients.values()
        share = ((mixed - reverse) / (forward - reverse))[:, None]
        torch.testing.assert_close(slope, share * forward_slope + (1 - share) * reverse_slope)


@pytest.mark.parametrize("kind", sorted(EVERY))
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_values_and_gradients_are_finite_at_extreme_logits(kind: str, scale: float) -> None:
    teacher, student = (normal(seed, 8, 16).float().sign() * scale for seed in (0, 1))
    targets = targets_of(kind, teacher, 1.0)
    for name, target in targets.items():
        z = student.clone().requires_grad_()
        found = value(term_of(kind, 1.0, **EVERY[kind]), z, target)
        found.sum().backward()
        assert found.isfinite().all(), name
        assert z.grad is not None
        assert z.grad.isfinite().all(), name


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.5, 1.0, 5.0]),
    st.sampled_from([*sorted(TERMS), "adaptive_kl", "decoupled_kd", "logit_mse"]),
)
def test_divergences_are_never_negative_and_zero_at_equality(seed: int, tau: float, kind: str) -> None:
    teacher, student = normal(seed, 4, 9).float(), normal(seed + 1, 4, 9).float()
    term = term_of(kind, tau, **EVERY[kind])
    for name, target in targets_of(kind, teacher, tau).items():
        if name == "zero":
            continue  # its probabilities sum to less than one
        assert (value(term, student, target) >= -1e-6).all(), name
        if name in {"whole", "head"}:
            torch.testing.assert_close(value(term, teacher, target), torch.zeros(4), rtol=0, atol=3e-6)


def test_worked_example_of_the_methods_page() -> None:
    """Teacher logits [5, 1, 0.5] against a uniform student, at tau 1 and 2: docs/methods.md."""
    teacher, student = torch.tensor([[5.0, 1.0, 0.5]]).double(), torch.zeros(1, 3).double()
    expected = {
        "forward_kl": (0.94988, 0.47362),
        "reverse_kl": (1.76372, 0.53376),
        "jensen_shannon": (0.26323, 0.11973),
        "skew_forward_kl": (0.78261, 0.38092),
        "skew_reverse_kl": (0.98516, 0.40608),
        "total_variation": (0.63808, 0.47264),
        "logit_mse": (4.05556, 4.05556),
    }
    found = {
        kind: tuple(round(float(value(term_of(kind, tau), student, LogitsTarget(teacher))), 5) for tau in (1.0, 2.0))
        for kind in expected
    }
    assert found == expected
