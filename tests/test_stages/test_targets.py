"""What a profile stores is what the teacher said, as exactly as it promises; what it samples is unbiased."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tristill.cache.profiles.heads import HeadSize
from tristill.cache.profiles.plain_topk import PlainTopKProfile
from tristill.cache.profiles.sampled import SampledProfile
from tristill.cache.profiles.topk import TopKProfile
from tristill.cache.spec import AnyProfile
from tristill.stages.dump.calibrate import Fitted, Fitter, Sample, as_given, round_trip
from tristill.stages.dump.config import DenseSettings, ProfileSettings, TransformSettings
from tristill.stages.dump.draws import draws, uniforms
from tristill.stages.dump.extract import LogitsBeyondError, TeacherPositions, target_arrays
from tristill.stages.dump.heads import Distribution, adaptive_head, signals
from tristill.stages.dump.transform import fit_transform
from tristill.stages.fidelity.measure import FeaturePairs, compare, full_gradients, gradient, mean_divergence
from tristill.stages.losses.forward_kl import ForwardKL
from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import (
    ComputedTargets,
    DrawnTarget,
    HeadTarget,
    LogitsTarget,
    RenormalisedTarget,
    RescaledTarget,
    SpreadTarget,
    Target,
)
from tristill.stages.targets.stored import make_targets

VOCAB, WIDTH, WINDOWS, CONTEXT = 120, 16, 40, 25
ALL = slice(None)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def teacher_positions(seed: int = 0, num_windows: int = WINDOWS) -> TeacherPositions:
    """A made-up teacher with what makes real ones easy to code: hidden states that depend on the input id, a falling
    spectrum, some ids likelier than others."""
    count = num_windows * CONTEXT
    spectrum = torch.logspace(0.3, -2.0, WIDTH)
    head_VD = torch.randn(VOCAB, WIDTH, generator=generator(1)) * 2
    head_VD[:, 0] += torch.linspace(3, -3, VOCAB)
    by_token_VD = torch.randn(VOCAB, WIDTH, generator=generator(2)) * spectrum
    ids_N = torch.randint(0, VOCAB, (count,), generator=generator(seed + 10))
    final_ND = by_token_VD[ids_N] + torch.randn(count, WIDTH, generator=generator(seed + 11)) * spectrum
    labels_N = torch.randint(0, VOCAB, (count,), generator=generator(seed + 12))
    return TeacherPositions(final_ND, head_VD, ids_N, labels_N, "train", list(range(num_windows)))


def student_at(positions: TeacherPositions) -> FeaturePairs:
    noise = torch.randn(positions.final_ND.shape, generator=generator(20)) * 0.3
    return FeaturePairs(
        positions.final_ND + noise, positions.head_VD + 0.1 * torch.randn(VOCAB, WIDTH, generator=generator(21))
    )


@pytest.fixture(scope="module")
def sample() -> Sample:
    measure = teacher_positions(seed=100)
    return Sample(teacher_positions(num_windows=160), measure, student_at(measure), "noised", 1_000_000)


def targets_of(fitted: Fitted, positions: TeacherPositions) -> tuple[object, dict[str, np.ndarray]]:
    """Through extraction, coder and back to what the losses take."""
    arrays = target_arrays(fitted.profile, fitted.tables, positions)
    stored, _ = round_trip(fitted, as_given(arrays, fitted.profile, positions), positions)
    entropy = {"teacher_entropy": arrays["teacher_entropy"] / np.float32(8)}
    flat = {
        name: torch.from_numpy(np.ascontiguousarray(array)).flatten(0, 1)
        for name, array in {**stored, **entropy}.items()
    }
    make = make_targets(fitted.profile, fitted.tables, VOCAB, torch.device("cpu"))
    return make(flat, positions.input_ids_N), arrays


def chunk_of(fitted: Fitted, positions: TeacherPositions) -> Target:
    return targets_of(fitted, positions)[0].chunk(slice(0, len(positions.final_ND)))  # type: ignore[attr-defined,no-any-return]


def value(tau: float, logits_NV: torch.Tensor, target: Target) -> torch.Tensor:
    return ForwardKL(tau).per_position(StudentChunk(logits_NV), torch.zeros(len(logits_NV)).long(), target)


def slope(tau: float, logits_NV: torch.Tensor, target: Target) -> torch.Tensor:
    student = StudentChunk(logits_NV, wants_gradient=True)
    ForwardKL(tau).per_position(student, torch.zeros(len(logits_NV)).long(), target)
    return student.gradient()


# What is extracted


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(1.0,), (0.5, 1.0, 3.0), (1.0, 2.0, 4.0, 5.0)]),
    st.integers(1, 5),
    st.integers(5, 40),
)
def test_adaptive_heads_hold_the_likely_entries_and_the_exact_mass_of_the_rest(
    seed: int, temperatures: tuple[float, ...], smallest: int, largest: int
) -> None:
    logits = torch.randn(20, 50, generator=generator(seed)) * 3
    size = HeadSize(probability=0.05, min_entries=smallest, max_entries=largest)
    head = adaptive_head(Distribution.of(logits, temperatures[0]), size, temperatures, with_tail=True)
    for row, z in enumerate(logits.double()):
        p = torch.softmax(z / temperatures[0], dim=-1)
        likely = int((p >= 0.05).sum())
        count = int(head["head_count"][row])
        assert count == min(max(likely, smallest), largest)
        ids = head["head_ids"][row, :count]
        assert set(ids.tolist()) == set(z.topk(count).indices.tolist())
        for m, tau in enumerate(temperatures):
            outside = torch.ones(50, dtype=torch.bool).scatter(0, ids, 0)
            expected = ((z[outside] - z.max()) / tau).logsumexp(0)
            assert float(head["tail_logsumexp"][row, m]) == pytest.approx(float(expected), abs=1e-4)


def test_signals_are_entropy_and_label_probability_in_eighths_of_a_nat() -> None:
    logits, labels = torch.randn(30, 40, generator=generator(0)) * 3, torch.arange(30)
    for tau in (1.0, 2.0):
        found = signals(Distribution.of(logits, tau), labels)
        p = torch.softmax(logits.double() / tau, -1)
        entropy = -(p * p.log()).sum(-1)
        label = -p[torch.arange(30), labels].log()
        assert float((found["teacher_entropy"] / 8 - entropy).abs().max()) <= 1 / 16 + 1e-5
        assert float((found["label_log_prob"] / 8 - label).abs().max()) <= 1 / 16 + 1e-5
        assert found["teacher_entropy"].dtype == torch.uint8


@pytest.mark.parametrize("draw", ["systematic", "independent"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_shares_of_draws_are_unbiased_and_converge_as_they_should(draw: str, tau: float) -> None:
    """The mean share over many positions of one distribution tends to p; systematic draws from nearer than chance."""
    profile = SampledProfile(draws=6, draw=draw, temperature=tau)
    logits = torch.randn(1, 30, generator=generator(3)) * 2
    p = torch.softmax(logits[0].double() / tau, -1)
    count = 20_000
    random = torch.from_numpy(uniforms(profile, "train", list(range(count // 100)), 100))
    found = draws(p[None].float().expand(count, -1), random, profile)
    assert (found["draw_counts"].sum(-1) == 6).all()
    used = torch.arange(6) < found["draw_unique"][:, None]
    assert ((found["draw_counts"] > 0) == used).all()
    shares = torch.zeros(count, 30).scatter_add_(1, found["draw_ids"], found["draw_counts"] / 6).double()
    deviation = (p * (1 - p) / 6 / count).sqrt()
    assert ((shares.mean(0) - p).abs() < 5 * deviation + 1e-9).all()
    variance = shares.var(0).sum()
    multinomial = (p * (1 - p) / 6).sum()
    if draw == "independent":
        assert float(variance / multinomial) == pytest.approx(1, rel=0.05)
    else:
        assert float(variance / multinomial) < 0.8


def test_draws_are_a_function_of_the_window_alone() -> None:
    profile = SampledProfile(draws=3, draw="independent")
    whole = uniforms(profile, "train", [4, 5, 6], 10)
    np.testing.assert_array_equal(uniforms(profile, "train", [5], 10), whole[10:20])
    assert (uniforms(profile, "validation", [5], 10) != whole[10:20]).all()
    assert (uniforms(profile.model_copy(update={"seed": 1}), "train", [5], 10) != whole[10:20]).all()


def test_the_transform_is_a_change_of_basis_and_sorted_by_what_it_leaves_over() -> None:
    positions = teacher_positions(num_windows=80)
    p = torch.full((VOCAB,), 1 / VOCAB)
    transform = fit_transform(positions.final_ND, positions.input_ids_N, positions.head_VD, p)
    coefficients = (positions.final_ND - transform.mean_D) @ transform.encoder_DD
    logits = transform.mean_V + coefficients @ transform.basis_DV
    exact = positions.logits(ALL)
    torch.testing.assert_close(
        logits - logits.mean(-1, keepdim=True), exact - exact.mean(-1, keepdim=True), rtol=1e-3, atol=1e-3
    )
    rest = coefficients - transform.table_VD[positions.input_ids_N]
    torch.testing.assert_close(rest.square().mean(0).sqrt(), transform.deviation_D, rtol=1e-2, atol=1e-4)
    assert (transform.deviation_D.diff() <= 1e-6).all()
    covariance = rest.T @ rest / len(rest)
    scale = transform.deviation_D[:, None] * transform.deviation_D
    assert float((covariance / scale - torch.eye(WIDTH)).abs().max()) < 0.05
    norms = (transform.basis_DV.square() / VOCAB).sum(-1)
    torch.testing.assert_close(norms, torch.ones(WIDTH), rtol=1e-3, atol=1e-3)


# What the losses see

TRANSFORM = TransformSettings(step=0.1, temperatures=(1.0, 2.0, 5.0), head=HeadSize(max_entries=8))


def test_transform_is_exact_on_the_head_and_in_the_mass_of_the_tail_at_declared_temperatures(sample: Sample) -> None:
    fitted = Fitter(sample).fit(TRANSFORM)
    positions = sample.measure
    targets, arrays = targets_of(fitted, positions)
    target = targets.chunk(slice(0, len(positions.final_ND)))  # type: ignore[attr-defined]
    assert isinstance(target, RescaledTarget)
    counts = torch.from_numpy(arrays["head_count"]).flatten()
    ids = torch.from_numpy(arrays["head_ids"]).flatten(0, 1)
    for tau in (1.0, 2.0, 5.0):
        log_p = target.log_probs(tau)
        exact = torch.log_softmax(positions.logits(ALL) / tau, -1)
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(log_p)), rtol=0, atol=1e-5)
        inside = torch.zeros_like(log_p, dtype=torch.bool)
        for row in range(len(log_p)):
            inside[row, ids[row, : counts[row]]] = True
        largest_gap = float((exact.amax(-1, keepdim=True) - exact)[inside].max()) * tau
        tolerance = (0.05 + 0.03 * largest_gap) / tau + 1 / 32
        assert float((log_p - exact)[inside].abs().max()) < tolerance, "half a step of the grid, and of the tail's mass"
        tail, exact_tail = (torch.where(inside, -math.inf, x).logsumexp(-1) for x in (log_p, exact))
        assert float((tail - exact_tail).abs().max()) < 0.1 + 0.03 * largest_gap
        assert mean_divergence(targets, full_of(positions), tau, len(log_p)) < 0.01  # type: ignore[arg-type,operator]


def test_transform_refuses_logits_that_it_would_cut_and_says_at_which_step_it_holds_them(sample: Sample) -> None:
    odd = sample.measure.final_ND.clone()
    odd[7] += 5000.0
    positions = replace(sample.measure, final_ND=odd)
    fitted = Fitter(sample).fit(TRANSFORM)
    with pytest.raises(
        LogitsBeyondError, match=r"expected at most 2047 steps of 0\.1.* set cache\.profile\.step to"
    ) as exc:
        target_arrays(fitted.profile, fitted.tables, positions)
    step = float(str(exc.value).split("cache.profile.step to ")[1].split()[0])
    coarse = Fitter(sample).fit(TRANSFORM.model_copy(update={"step": step}))
    targets, _ = targets_of(coarse, positions)
    log_p = targets.chunk(slice(7, 8)).log_probs(1.0)  # type: ignore[attr-defined]
    assert int(log_p.argmax()) == int(positions.logits(slice(7, 8)).argmax())


def full_of(positions: TeacherPositions) -> ComputedTargets:
    return ComputedTargets(positions.final_ND, positions.head_VD)


def test_between_declared_temperatures_the_mass_is_interpolated_well(sample: Sample) -> None:
    """Stated in docs/methods.md: within the range the divergence stays what it is at the temperatures beside it."""
    fitted = Fitter(sample).fit(TRANSFORM)
    targets, _ = targets_of(fitted, sample.measure)
    count = len(sample.measure.final_ND)
    found = {
        tau: mean_divergence(targets, full_of(sample.measure), tau, count)  # type: ignore[arg-type]
        for tau in (0.8, 1.0, 1.4, 2.0, 3.0, 5.0, 9.0)
    }
    assert all(value is not None and 0 <= value < 0.01 for value in found.values()), found
    alone = Fitter(sample).fit(TRANSFORM.model_copy(update={"temperatures": (1.0,)}))
    for tau in (0.5, 2.0):
        beyond = mean_divergence(targets_of(alone, sample.measure)[0], full_of(sample.measure), tau, count)  # type: ignore[arg-type]
        assert beyond is not None
        assert beyond < 0.02
    assert found[1.4] < 1.5 * max(found[1.0], found[2.0])  # type: ignore[operator,type-var]
    assert found[3.0] < 1.5 * max(found[2.0], found[5.0])  # type: ignore[operator,type-var]


def test_a_finer_step_is_a_better_target_and_costs_more(sample: Sample) -> None:
    fitter = Fitter(sample)
    points = [
        fitter.measure(fitter.fit(TRANSFORM.model_copy(update={"step": step})), (1.0, 5.0)) for step in (1.0, 0.3, 0.1)
    ]
    for coarse, fine in itertools.pairwise(points):
        assert fine.bytes_per_position > coarse.bytes_per_position
        assert fine.kl_nats["1"] < coarse.kl_nats["1"]  # type: ignore[operator]
        assert fine.angle_deg["5"] < coarse.angle_deg["5"]


def test_dense_targets_are_online_ones_to_a_stated_tolerance(sample: Sample) -> None:
    fitted = Fitter(sample).fit(DenseSettings())
    target = chunk_of(fitted, sample.measure)
    assert isinstance(target, LogitsTarget)
    for tau in (0.5, 1.0, 5.0):
        assert mean_divergence(targets_of(fitted, sample.measure)[0], full_of(sample.measure), tau, 1000) < 1e-3  # type: ignore[arg-type,operator]
    angle, ratio = compare(
        gradient(sample.student, targets_of(fitted, sample.measure)[0], 1.0),  # type: ignore[arg-type]
        full_gradients(sample.student, full_of(sample.measure), [1.0])[1.0],
    )
    assert angle < 1
    assert ratio == pytest.approx(1, abs=0.01)


def test_a_bucket_of_counted_entries_is_the_divergence_over_head_and_rest(sample: Sample) -> None:
    profile = TopKProfile(head=HeadSize(max_entries=6), temperatures=(1.0, 2.0))
    fitted = Fitter(sample).fit(profile)
    target = chunk_of(fitted, sample.measure)
    assert isinstance(target, HeadTarget)
    student = torch.randn(len(sample.measure.final_ND), VOCAB, generator=generator(5))
    for tau in (1.0, 2.0):
        log_p, log_tail = target.log_probs(tau)
        there = torch.isfinite(log_p)
        q = torch.softmax(student.double() / tau, -1)
        expected = []
        for row in range(50):
            ids = target.head_ids_NK[row][there[row]]
            p = log_p[row][there[row]].double().exp()
            assert log_tail is not None
            p_tail, q_tail = float(log_tail[row].double().exp()), 1 - float(q[row, ids].sum())
            expected.append(float((p * (p / q[row, ids]).log()).sum()) + p_tail * math.log(p_tail / q_tail))
        found = value(tau, student[:50], part(target, 50))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        numeric = numeric_slope(tau, student[:3], part(target, 3))
        torch.testing.assert_close(
            slope(tau, student[:3].double(), part(target, 3)), numeric, rtol=1e-3, atol=1e-4, check_dtype=False
        )


def part(target: HeadTarget, rows: int) -> HeadTarget:
    tail = target.tail_logsumexp_NM
    return HeadTarget(
        target.head_ids_NK[:rows],
        target.head_logits_NK[:rows],
        None if tail is None else tail[:rows],
        target.temperatures,
    )


def numeric_slope(tau: float, logits_NV: torch.Tensor, target: Target) -> torch.Tensor:
    """Central differences, one logit after the other."""
    logits_NV = logits_NV.double()
    result = torch.zeros_like(logits_NV)
    for v in range(logits_NV.shape[1]):
        step = torch.zeros_like(logits_NV)
        step[:, v] = 1e-4
        result[:, v] = (value(tau, logits_NV + step, target) - value(tau, logits_NV - step, target)) / 2e-4
    return result


def test_an_even_tail_spreads_its_mass_and_no_tail_renormalises(sample: Sample) -> None:
    fitter = Fitter(sample)
    settings: dict[str, ProfileSettings] = {
        tail: TopKProfile(head=HeadSize(max_entries=6), tail=tail) for tail in ("bucket", "uniform", "nothing")
    }
    found = {tail: chunk_of(fitter.fit(profile), sample.measure) for tail, profile in settings.items()}
    bucket, even, nothing = found["bucket"], found["uniform"], found["nothing"]
    assert isinstance(bucket, HeadTarget)
    assert isinstance(even, SpreadTarget)
    assert isinstance(nothing, RenormalisedTarget)
    log_p, log_tail = bucket.log_probs(1.0)
    spread = even.log_probs(1.0).exp()
    torch.testing.assert_close(spread.sum(-1), torch.ones(len(spread)), rtol=0, atol=1e-5)
    assert log_tail is not None
    head_ids, there = bucket.head_ids_NK[0], torch.isfinite(log_p[0])
    outside = torch.ones(VOCAB, dtype=torch.bool).scatter(0, head_ids, 0)
    expected = log_tail[0].exp() / int(outside.sum())
    torch.testing.assert_close(spread[0][outside], expected.expand(int(outside.sum())))
    torch.testing.assert_close(spread[0, head_ids[there]], log_p[0][there].exp())
    renormalised, no_tail = nothing.log_probs(1.0)
    assert no_tail is not None
    assert no_tail.isneginf().all()
    torch.testing.assert_close(renormalised.exp().sum(-1), torch.ones(len(renormalised)))
    student = torch.randn(len(spread), VOCAB, generator=generator(6))
    reference = renormalised[0].exp() * (renormalised[0] - torch.log_softmax(student[0], -1)[nothing.head_ids_NK[0]])
    expected_value = float(reference[torch.isfinite(renormalised[0])].sum())
    assert float(value(1.0, student, nothing)[0]) == pytest.approx(expected_value, rel=1e-4)


def test_divergence_and_gradient_from_draws_are_unbiased(sample: Sample) -> None:
    """Over many draws of the same positions, both tend to those of the full distribution."""
    positions = teacher_positions(seed=7, num_windows=2)
    student = torch.randn(len(positions.final_ND), VOCAB, generator=generator(8))
    full = LogitsTarget(positions.logits(ALL))
    exact_value, exact_slope = value(1.0, student, full), slope(1.0, student, full)
    values, slopes = torch.zeros_like(exact_value), torch.zeros_like(exact_slope)
    rounds = 400
    for seed in range(rounds):
        fitted = Fitted(SampledProfile(draws=6, seed=seed), {})
        arrays = target_arrays(fitted.profile, {}, positions)
        flat = {name: torch.from_numpy(array).flatten(0, 1) for name, array in arrays.items()}
        target = DrawnTarget(flat["draw_ids"].long(), flat["draw_counts"].float() / 6, flat["teacher_entropy"] / 8, 1.0)
        values += value(1.0, student, target)
        slopes += slope(1.0, student, target)
    entropy_rounding = 1 / 16
    assert float((values / rounds - exact_value).abs().max()) < entropy_rounding + 0.35
    assert float((values / rounds - exact_value).mean().abs()) < 0.02
    assert (
        float((slopes / rounds - exact_slope).square().mean().sqrt())
        < 0.02 * float(exact_slope.square().mean().sqrt()) + 5e-3
    )


@pytest.mark.parametrize(
    "settings_of",
    [
        SampledProfile(draws=9),
        TopKProfile(head=HeadSize(max_entries=7), temperatures=(1.0, 2.0)),
        TopKProfile(head=HeadSize(max_entries=7), tail="uniform"),
        TRANSFORM,
        DenseSettings(),
        PlainTopKProfile(top_k=9),
    ],
    ids=lambda settings: f"{settings.kind} {getattr(settings, 'tail', '')}",
)
def test_targets_do_not_depend_on_how_they_are_cut(sample: Sample, settings_of: ProfileSettings) -> None:
    fitted = Fitter(sample).fit(settings_of)
    targets, _ = targets_of(fitted, sample.measure)
    student = torch.randn(len(sample.measure.final_ND), VOCAB, generator=generator(9))
    whole = value(1.0, student, targets.chunk(slice(0, len(student))))  # type: ignore[attr-defined]
    cut = torch.cat([value(1.0, student[rows], targets.chunk(rows)) for rows in (slice(0, 7), slice(7, 1000))])  # type: ignore[attr-defined]
    torch.testing.assert_close(whole, cut, rtol=1e-5, atol=1e-5)
    assert profile_kind(fitted.profile) == settings_of.kind


def profile_kind(profile: AnyProfile) -> str:
    return profile.kind


@pytest.mark.parametrize("spike", [5.0, 12.0, 20.0, 40.0])
def test_bucket_gradients_keep_their_digits_however_sure_the_student_is(spike: float) -> None:
    """Against float64 and a dense formula, relative to the largest entry of every position."""
    teacher = torch.randn(16, 40, generator=generator(30))
    student = torch.randn(16, 40, generator=generator(31))
    student[:, 3] += spike
    ids = torch.cat([torch.full((16, 1), 3), teacher[:, 4:].topk(2).indices + 4, torch.full((16, 1), 3)], dim=1)
    logits = teacher.gather(1, ids)
    logits[:, 3] = -math.inf  # an entry that is not there repeats the first id
    tail = teacher.scatter(1, ids, -math.inf).logsumexp(-1)
    target = HeadTarget(ids, logits, tail[:, None], (1.0,))
    p, q = torch.softmax(teacher.double(), -1), torch.softmax(student.double(), -1)
    outside = torch.ones(16, 40, dtype=torch.bool).scatter(1, ids, 0)
    p_tail, q_tail = ((x * outside).sum(-1, keepdim=True) for x in (p, q))
    expected = torch.where(outside, q * (1 - p_tail / q_tail), q - p)
    error = (slope(1.0, student, target) - expected).abs().amax(-1)
    assert float((error / expected.abs().amax(-1)).max()) < 2e-4


def test_no_mass_outside_the_head_is_no_trouble() -> None:
    """A tail of nothing: K = V, or all of it below what floats hold."""
    teacher, student = torch.randn(5, 6, generator=generator(32)), torch.randn(5, 6, generator=generator(33))
    ids = torch.arange(6).expand(5, 6)
    empty = torch.full((5, 2), -math.inf)
    head = HeadTarget(ids, teacher - teacher.amax(-1, keepdim=True), empty, (1.0, 2.0))
    exact = LogitsTarget(teacher)
    for target in (head, SpreadTarget(head, 6), RescaledTarget.of(torch.zeros(5, 6), head)):
        for tau in (1.0, 2.0) if target is head or isinstance(target, SpreadTarget) else (0.7, 1.0, 1.5, 2.0):
            torch.testing.assert_close(value(tau, student, target), value(tau, student, exact), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(slope(tau, student, target), slope(tau, student, exact), rtol=1e-4, atol=1e-5)
    few = HeadTarget(ids[:, :2], teacher[:, :2] - teacher[:, :2].amax(-1, keepdim=True), empty, (1.0, 2.0))
    for few_target in (few, SpreadTarget(few, 6), RescaledTarget.of(torch.zeros(5, 6), few)):
        assert value(1.0, student, few_target).isfinite().all()
        assert slope(1.0, student, few_target).isfinite().all()


def test_angles_and_ratios_are_those_of_the_gradients() -> None:
    one = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    angle, ratio = compare(2 * one, one)
    assert (angle, ratio) == pytest.approx((0, 2))
    angle, ratio = compare(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), one)
    assert (angle, ratio) == pytest.approx((45, math.sqrt(2)))
