"""Each metric against its definition in plain Python."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tristill.stages.dump.topk import topk_target
from tristill.stages.evaluate.metrics import Documents, MetricSums, UnitSums, ValidationMetrics, acceptance
from tristill.stages.losses.target import ComputedTargets, LogitsTarget
from tristill.stages.targets.source import TargetBatch
from tristill.stages.targets.stored import PlainHeads


def logits(seed: int, positions: int, vocab: int) -> torch.Tensor:
    return torch.randn(positions, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    total = sum(math.exp(z / tau) for z in row)
    return [math.exp(z / tau) / total for z in row]


def calibration_bins(rows: list[list[float]], labels: list[int], bins: int) -> dict[int, list[tuple[float, bool]]]:
    """Confidence, and whether it was right, of every position, by bin."""
    members: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(rows, labels, strict=True):
        p = softmax(row)
        confidence = max(p)
        members.setdefault(min(int(confidence * bins), bins - 1), []).append((confidence, p.index(confidence) == label))
    return members


def calibration_error(rows: list[list[float]], labels: list[int], bins: int) -> float:
    """Naeini et al. 2015: sum over bins of |accuracy - confidence| weighted by the bin's share."""
    error = 0.0
    for entries in calibration_bins(rows, labels, bins).values():
        accuracy = sum(hit for _, hit in entries) / len(entries)
        confidence = sum(value for value, _ in entries) / len(entries)
        error += len(entries) / len(rows) * abs(accuracy - confidence)
    return error


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([1.0, 2.0]), st.integers(1, 30))
def test_metrics_are_their_definitions(seed: int, tau: float, cut: int) -> None:
    student, teacher = logits(seed, 40, 12), logits(seed + 1, 40, 12)
    labels = torch.randint(0, 12, (40,), generator=torch.Generator().manual_seed(seed))
    targets = ComputedTargets(teacher, torch.eye(12))
    sums = MetricSums(calibration_bins=7, temperature=tau)
    for rows in (slice(0, cut), slice(cut, 40)):
        sums.add(student[rows], labels[rows], targets.chunk(rows))
    found = sums.metrics(bytes_per_token=3.3)

    rows_q, rows_p, y = student.tolist(), teacher.tolist(), labels.tolist()
    loss = sum(-math.log(softmax(row)[label]) for row, label in zip(rows_q, y, strict=True)) / 40
    pairs = [(softmax(p, tau), softmax(q, tau)) for p, q in zip(rows_p, rows_q, strict=True)]
    assert found.positions == 40
    assert found.loss_nats == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(loss / math.log(2) / 3.3, rel=1e-5)
    assert found.expected_calibration_error == pytest.approx(calibration_error(rows_q, y, 7), abs=1e-6)
    assert found.calibration is not None
    members = calibration_bins(rows_q, y, 7)
    assert [one.count for one in found.calibration] == [len(members.get(m, ())) for m in range(7)]
    for m, one in enumerate(found.calibration):
        if entries := members.get(m):
            assert one.confidence == pytest.approx(sum(value for value, _ in entries) / len(entries), rel=1e-5)
            assert one.accuracy == pytest.approx(sum(hit for _, hit in entries) / len(entries))
        else:
            assert one.confidence is one.accuracy is None
    kl = sum(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) for p, q in pairs) / 40
    assert found.kl_to_teacher_nats == pytest.approx(kl, rel=1e-4)
    agreement = sum(p.index(max(p)) == q.index(max(q)) for p, q in pairs) / 40
    assert found.top1_agreement == pytest.approx(agreement)
    accepted = sum(sum(min(a, b) for a, b in zip(p, q, strict=True)) for p, q in pairs) / 40
    assert found.acceptance_rate == pytest.approx(accepted, rel=1e-5)
    assert found.teacher_temperature == tau


def test_a_summary_without_calibration_bins_is_read() -> None:
    sums = MetricSums(3, 1.0)
    sums.add(logits(0, 4, 6), torch.zeros(4).long(), None)
    found = sums.metrics(1.0)
    older = found.model_dump_json(exclude={"calibration"})
    assert ValidationMetrics.model_validate_json(older) == found.model_copy(update={"calibration": None})


def test_without_a_teacher_its_metrics_are_none() -> None:
    sums = MetricSums(5, 1.0)
    sums.add(logits(0, 4, 6), torch.zeros(4).long(), None)
    found = sums.metrics(1.0)
    assert (
        found.kl_to_teacher_nats is found.top1_agreement is found.acceptance_rate is found.teacher_temperature is None
    )


def test_acceptance_on_a_bucket_is_the_upper_bound_of_the_definition() -> None:
    teacher, student = logits(0, 50, 12), logits(1, 50, 12)
    whole = acceptance(student, LogitsTarget(teacher), 1.0)
    for top_k in (1, 4, 11, 12):
        arrays = topk_target(teacher.clone(), top_k, 1.0)
        target = PlainHeads(arrays, "bucket" if top_k < 12 else None, 1.0, 12).chunk(slice(None))
        partial = acceptance(student, target, 1.0)
        assert (partial >= whole - 1e-6).all()
        assert torch.equal(target.top1(), teacher.argmax(-1))
        p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
        ids = arrays["head_ids"]
        expected = torch.minimum(p.gather(1, ids), q.gather(1, ids)).sum(-1) + torch.minimum(
            1 - p.gather(1, ids).sum(-1), 1 - q.gather(1, ids).sum(-1)
        )
        torch.testing.assert_close(partial, expected, rtol=1e-4, atol=1e-5)


def test_standard_errors_are_those_of_a_ratio_over_documents() -> None:
    """Against the formula in plain Python, whatever the chunks."""
    documents = [list(range(start, start + size)) for start, size in ((0, 5), (5, 9), (14, 1), (15, 2), (17, 12), (29, 3),
                                                                             (32, 1), (33, 1), (34, 3), (37, 3))]  # fmt: skip
    student, teacher = logits(1, 40, 12), logits(2, 40, 12)
    labels = torch.randint(0, 12, (40,), generator=torch.Generator().manual_seed(3))
    units = torch.tensor([2 * n for n, members in enumerate(documents) for _ in members])  # numbers may have gaps
    targets = ComputedTargets(teacher, torch.eye(12))
    sums = MetricSums(3, 1.0, [UnitSums("document", 30)])
    for rows in (slice(0, 7), slice(7, 31), slice(31, 40)):
        sums.add(student[rows], labels[rows], targets.chunk(rows), [units[rows]])
    found = sums.metrics(1.0).standard_errors
    losses = [-math.log(softmax(row)[label]) for row, label in zip(student.tolist(), labels.tolist(), strict=True)]
    mean = sum(losses) / 40
    squares = sum((sum(losses[i] for i in members) - mean * len(members)) ** 2 for members in documents)
    assert found is not None
    assert (found.unit, found.num_units) == ("document", 10)
    assert found.loss_nats == pytest.approx(math.sqrt(squares * 10 / 9) / 40, rel=1e-5)
    hits = (student.argmax(-1) == teacher.argmax(-1)).double().tolist()
    squares = sum((sum(hits[i] for i in members) - sum(hits) / 40 * len(members)) ** 2 for members in documents)
    assert found.top1_agreement == pytest.approx(math.sqrt(squares * 10 / 9) / 40)
    assert found.kl_to_teacher_nats is not None
    few = MetricSums(3, 1.0, [UnitSums("document", 8), UnitSums("window", 9)])
    few.add(student, labels, None, [torch.arange(40) // 5, torch.arange(40) // 20])
    errors = few.metrics(1.0).standard_errors
    assert errors is not None
    assert (errors.unit, errors.num_units, errors.kl_to_teacher_nats) == ("window", 2, None), "eight documents are few"


def test_documents_are_told_apart_by_their_end_across_windows() -> None:
    stream = torch.tensor([5, 5, 0, 6, 6, 6, 6, 6, 0, 7, 0, 8, 8])
    expected = [1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4]  # the end of a document is its last label
    for length in (2, 3, 4, 6, 12):
        ids = torch.stack([stream[at : at + length + 1] for at in range(0, 12, length)])
        documents = Documents(Windows(ids), "validation")  # type: ignore[arg-type]
        found = torch.cat([documents.of(first, ids[first : first + 2, :-1])[0] for first in range(0, len(ids), 2)])
        assert int(found.max()) < documents.most
        names = {number: name for name, number in enumerate(dict.fromkeys(found.flatten().tolist()), start=1)}
        assert [names[number] for number in found.flatten().tolist()] == expected[1:], length


class Windows:
    """A source of windows alone."""

    end_of_text_id = 0

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def batches(self, *_: object) -> Iterator[TargetBatch]:
        for ids_B1 in self._ids.split(2):
            yield TargetBatch(ids_B1[:, :-1], ids_B1[:, 1:], None, {})
