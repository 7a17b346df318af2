"""Cross-entropy on the labels."""

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from stages.losses.target import HeadTarget


@dataclass(frozen=True)
class CrossEntropy:
    """-log q(label), q = softmax(logits), in nats."""

    name: str = "cross_entropy"
    needs_teacher: bool = False

    def per_position(self, logits_NV: Tensor, labels_N: Tensor, target: HeadTarget | None) -> Tensor:  # noqa: ARG002
        """(N,) float32."""
        return F.cross_entropy(logits_NV, labels_N, reduction="none")
