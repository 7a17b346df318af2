"""Every term against a slow float64 reference; gradients by gradcheck; chunked equals whole."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tristill.stages.distill.scheduled_terms import ScheduledTerms
from tristill.stages.dump.select import largest
from tristill.stages.dump.topk import topk_target
from tristill.stages.losses.chunked_head import chunked_head_loss, chunks
from tristill.stages.losses.config import LossConfig
from tristill.stages.losses.cross_entropy import CrossEntropy
from tristill.stages.losses.forward_kl import ForwardKL
from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import ComputedTargets, HeadTarget, LogitsTarget, Target, Targets
from tristill.stages.losses.term import DistributionTerm, WeightedTerm
from tristill.stages.targets.stored import PlainHeads

SEEDS = st.integers(0, 2**31)


def normal(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def reference_bucket_kl(student: list[float], teacher: list[float], top_k: int, tau: float) -> float:
    """Head entries one by one, all others as one bucket, in plain Python."""
    p = [math.exp(z / tau) / sum(math.exp(y / tau) for y in teacher) for z in teacher]
    q = [math.exp(z / tau) / sum(math.exp(y / tau) for y in student) for z in student]
    head = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    tail = [i for i in range(len(p)) if i not in head]
    value = sum(p[i] * math.log(p[i] / q[i]) for i in head)
    if tail:
        p_tail, q_tail = sum(p[i] for i in tail), sum(q[i] for i in tail)
        value += p_tail * math.log(p_tail / q_tail)
    return value


def stored(teacher_NV: torch.Tensor, top_k: int, tau: float) -> PlainHeads:
    vocab = teacher_NV.shape[1]
    return PlainHeads(topk_target(teacher_NV.clone(), top_k, tau), "bucket" if top_k < vocab else None, tau, vocab)


def exact(target: PlainHeads) -> HeadTarget:
    """The chunk in float64: the losses work in the type they are given."""
    part = target.chunk(slice(None))
    tail = None if part.tail_logsumexp_NM is None else part.tail_logsumexp_NM.double()
    return HeadTarget(part.head_ids_NK, part.head_logits_NK.double(), tail, part.temperatures)


class Term(torch.autograd.Function):
    """A term whose closed-form gradient autograd can be compared with."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, term: DistributionTerm, labels_N: torch.Tensor, target: Target
    ) -> Any:
        student = StudentChunk(logits_NV.detach(), wants_gradient=True)
        value_N = term.per_position(student, labels_N, target, weight=1.0)
        ctx.save_for_backward(student.gradient())
        return value_N

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * gradients[0][:, None], None, None, None


def divergence(tau: float, student_NV: torch.Tensor, target: Target) -> torch.Tensor:
    labels_N = torch.zeros(len(student_NV)).long()
    return Term.apply(student_NV, ForwardKL(tau), labels_N, target)  # type: ignore[no-untyped-call,no-any-return]


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(2, 20), st.data(), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_forward_kl_is_the_divergence_of_head_and_bucket(
    seed: int, vocab: int, data: st.DataObject, tau: float
) -> None:
    top_k = data.draw(st.integers(1, vocab))
    teacher, student = normal(seed, 3, vocab), normal(seed + 1, 3, vocab)
    found = divergence(tau, student, exact(stored(teacher, top_k, tau)))
    expected = [reference_bucket_kl(s, t, top_k, tau) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(2, 40), st.data(), st.sampled_from([0.5, 1.0, 5.0]))
def test_forward_kl_is_never_negative_and_zero_at_equality(
    seed: int, vocab: int, data: st.DataObject, tau: float
) -> None:
    top_k = data.draw(st.integers(1, vocab))
    teacher, student = normal(seed, 4, vocab).float(), normal(seed + 1, 4, vocab).float()
    target = stored(teacher, top_k, tau).chunk(slice(None))
    assert (divergence(tau, student, target) >= -1e-6).all()
    at_equality = divergence(tau, teacher, target)
    torch.testing.assert_close(at_equality, torch.zeros(4), rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("top_k", [1, 5, 16])
def test_values_and_gradients_are_finite_at_extreme_logits(scale: float, top_k: int) -> None:
    teacher, student = normal(0, 8, 16).float().sign() * scale, (normal(1, 8, 16).float().sign() * scale)
    student.requires_grad_()
    value = divergence(1.0, student, stored(teacher, top_k, 1.0).chunk(slice(None)))
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [1, 4, 9])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_hand_written_gradients_pass_gradcheck(top_k: int, tau: float) -> None:
    target = exact(stored(normal(0, 3, 9), top_k, tau))
    student = normal(1, 3, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergence(tau, z, target), (student,))
    dense = LogitsTarget(normal(0, 3, 9))
    assert torch.autograd.gradcheck(lambda z: divergence(tau, z, dense), (student,))


def test_worked_example_of_the_methods_page() -> None:
    """Teacher logits [5, 1, 0.5] against a uniform student: docs/methods.md."""
    teacher, student = torch.tensor([[5.0, 1.0, 0.5]]), torch.zeros(1, 3)
    values = {
        (top_k, tau): float(divergence(tau, student, stored(teacher, top_k, tau).chunk(slice(None))))
        for top_k in (1, 3)
        for tau in (1.0, 2.0)
    }
    assert values == pytest.approx(
        {(3, 1.0): 0.94988, (3, 2.0): 0.47362, (1, 1.0): 0.94902, (1, 2.0): 0.47212}, abs=1e-5
    )


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.sampled_from([(5, 3), (64, 8), (128, 4), (2048, 32), (2048, 200), (1001, 9)]))
def test_largest_agrees_with_topk(seed: int, shape: tuple[int, int]) -> None:
    vocab, top_k = shape
    logits = normal(seed, 6, vocab).float()
    values, ids = largest(logits, top_k)
    expected = logits.topk(top_k)
    torch.testing.assert_close(values, expected.values, rtol=0, atol=0)
    torch.testing.assert_close(ids, expected.indices, rtol=0, atol=0)


def test_largest_is_right_with_infinities() -> None:
    logits = normal(0, 4, 64).float()
    logits[:, 10:60] = -torch.inf
    logits[0, 3] = torch.inf
    for top_k in (4, 12):
        values, ids = largest(logits, top_k)
        torch.testing.assert_close(values, logits.topk(top_k).values, rtol=0, atol=0)
        torch.testing.assert_close(logits.gather(1, ids), values, rtol=0, atol=0)


def test_chunks_cover_all_rows_and_stay_large_enough_for_a_large_vocabulary() -> None:
    assert chunks(600, 2048) == [slice(0, 256), slice(256, 512), slice(512, 600)]
    assert chunks(600, 150_000) == [slice(0, 256), slice(256, 512), slice(512, 600)]


def test_largest_is_right_with_ties_and_signed_zeros() -> None:
    logits = torch.tensor([[0.0, -0.0, 1.0, 1.0] * 16, [-2.0] * 64])
    values, ids = largest(logits, 4)
    torch.testing.assert_close(values, logits.topk(4).values, rtol=0, atol=0)
    torch.testing.assert_close(logits.gather(1, ids), values, rtol=0, atol=0)
    assert all(len(set(row)) == 4 for row in ids.tolist())


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([1, 7, 99, 100]))
def test_stored_head_and_tail_are_the_distribution(seed: int, tau: float, top_k: int) -> None:
    teacher = normal(seed, 5, 100)
    target = exact(stored(teacher, top_k, tau))
    head_log_probs, tail_log_prob = target.log_probs(tau)
    p = torch.softmax(teacher / tau, dim=-1)
    torch.testing.assert_close(head_log_probs.exp(), p.gather(-1, target.head_ids_NK), rtol=1e-5, atol=1e-9)
    if top_k < 100:
        assert tail_log_prob is not None
        tail = p.scatter(-1, target.head_ids_NK, 0).sum(dim=-1)
        torch.testing.assert_close(tail_log_prob.exp(), tail, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(head_log_probs.exp().sum(-1) + tail_log_prob.exp(), torch.ones(5).double())


def weighted_terms(alpha: float, tau: float) -> list[WeightedTerm]:
    return ScheduledTerms(LossConfig(alpha=alpha, temperature=tau), 1, 1.0).at(0)


def naive(
    final: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, targets: Targets, alpha: float, tau: float
) -> torch.Tensor:
    """alpha CE + (1 - alpha) tau^2 KL over the whole [positions, V] at once."""
    logits = final @ head.T
    ce = torch.nn.functional.cross_entropy(logits, labels)
    target = targets.chunk(slice(None), torch.float64)
    assert isinstance(target, LogitsTarget)
    log_p = target.log_probs(tau).double()
    kl = (log_p.exp() * (log_p - torch.log_softmax(logits / tau, -1))).sum(-1).mean()
    return alpha * ce + (1 - alpha) * tau**2 * kl


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.integers(1, 30), st.integers(2, 40), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1.0, 3.0]))
def test_chunked_head_equals_the_naive_float64_loss_and_gradients(
    seed: int, positions: int, vocab: int, alpha: float, tau: float
) -> None:
    final, head = normal(seed, positions, 6, scale=1.0), normal(seed + 1, vocab, 6, scale=1.0)
    labels = torch.randint(0, vocab, (positions,), generator=torch.Generator().manual_seed(seed))
    targets = ComputedTargets(normal(seed + 2, positions, 6), normal(seed + 3, vocab, 6))
    terms = weighted_terms(alpha, tau)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for rows in (1, 4, 256):
            patch.setattr("tristill.stages.losses.chunked_head._CHUNK_ELEMENTS", rows * vocab)
            patch.setattr("tristill.stages.losses.chunked_head._SMALLEST_CHUNK_ROWS", 1)
            f, w = final.clone().requires_grad_(), head.clone().requires_grad_()
            values = chunked_head_loss(f, w, labels, targets, terms)
            (2.0 * values.total).backward()
            results.append((values.total.detach(), f.grad / 2, w.grad / 2))
    f, w = final.clone().requires_grad_(), head.clone().requires_grad_()
    total = naive(f, w, labels, targets, alpha, tau)
    total.backward()
    for result in results:
        for found, expected in zip(result, (total.detach(), f.grad, w.grad), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_tau_squared_scales_the_gradient_not_only_the_number() -> None:
    """With tau^2 the gradient of small logits is the same at any high temperature (Hinton et al. 2015, equation 4)."""
    identity, labels = torch.eye(8, dtype=torch.float64), torch.zeros(1).long()
    teacher = ComputedTargets(normal(1, 1, 8, scale=0.1), identity)
    gradients = []
    for tau in (10.0, 20.0):
        z = normal(0, 1, 8, scale=0.1).requires_grad_()
        chunked_head_loss(z, identity, labels, teacher, weighted_terms(0, tau)).total.backward()
        gradients.append(z.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=1e-5)


def test_cached_full_vocabulary_and_online_targets_give_one_loss() -> None:
    final, head = normal(0, 12, 6).float(), normal(1, 40, 6).float()
    teacher_final, teacher_head = normal(2, 12, 6).float(), normal(3, 40, 6).float()
    labels = torch.arange(12)
    online = ComputedTargets(teacher_final, teacher_head)
    for tau in (1.0, 2.5):
        cached = stored(teacher_final @ teacher_head.T, 40, tau)
        totals = []
        for targets in (cached, online):
            f = final.clone().requires_grad_()
            total = chunked_head_loss(f, head, labels, targets, weighted_terms(0.4, tau)).total
            total.backward()
            totals.append((total.detach(), f.grad))
        torch.testing.assert_close(totals[0], totals[1], rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast_stays_close_to_float32() -> None:
    final, head = normal(0, 64, 32, scale=1.0).float(), normal(1, 100, 32, scale=0.2).float()
    labels = torch.arange(64)
    f32, bf16 = final.clone().requires_grad_(), final.clone().requires_grad_()
    terms = [WeightedTerm(1.0, CrossEntropy())]
    exact_values = chunked_head_loss(f32, head, labels, None, terms)
    exact_values.total.backward()
    with torch.autocast("cpu", torch.bfloat16):
        values = chunked_head_loss(bf16, head, labels, None, terms)
    values.total.backward()
    torch.testing.assert_close(values.total, exact_values.total, rtol=5e-3, atol=0)
    assert float((bf16.grad - f32.grad).norm() / f32.grad.norm()) < 2e-2
