"""Cross-entropy on the labels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tristill.stages.losses.student import StudentChunk
from tristill.stages.losses.target import Target


@dataclass(frozen=True)
class CrossEntropy:
    """-log q(label), q = softmax(logits), in nats; the gradient is q - 1 at the label, q elsewhere."""

    name: ClassVar[str] = "cross_entropy"
    needs_teacher: ClassVar[bool] = False

    def per_position(
        self,
        student: StudentChunk,
        labels_N: Tensor,
        target: Target | None,  # noqa: ARG002
        weight: float | Tensor = 1.0,
    ) -> Tensor:
        """See DistributionTerm."""
        labels_N1 = labels_N[:, None]
        value_N1 = -student.log_q(1.0).gather(-1, labels_N1)
        if student.wants_gradient:
            student.add_softmax(1.0, weight)
            student.add_at(labels_N1, torch.ones_like(value_N1) * -weight)
        return value_N1[:, 0]
