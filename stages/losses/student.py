"""The student at the positions of one chunk: its log-probabilities, shared by all terms, and the gradient they leave.

Every term's gradient in the logits is a multiple of the student's own softmax minus something, so the softmax at each
temperature is computed once, however many terms there are.

Shapes: N positions, V vocabulary, K entries.
"""

import torch
from torch import Tensor


class StudentChunk:
    """Logits of N positions, float32 or float64; collects the gradient of a weighted sum of terms in them."""

    def __init__(self, logits_NV: Tensor, *, wants_gradient: bool = False) -> None:
        self.logits_NV = logits_NV
        self.wants_gradient = wants_gradient
        self._log_q: dict[float, Tensor] = {}
        self._softmax_weights: dict[float, Tensor | float] = {}
        self._dense: list[tuple[Tensor, float | Tensor]] = []
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._sparse: list[tuple[Tensor, Tensor]] = []

    def log_q(self, temperature: float) -> Tensor:
        """log softmax(logits / temperature), (N, V); not to be written to."""
        if temperature not in self._log_q:
            scaled_NV = self.logits_NV if temperature == 1 else self.logits_NV / temperature
            self._log_q[temperature] = torch.log_softmax(scaled_NV, dim=-1)
        return self._log_q[temperature]

    def add_softmax(self, temperature: float, weight: Tensor | float) -> None:
        """Add weight * softmax(logits / temperature) to the gradient; weight is a number, or (N, 1)."""
        self._softmax_weights[temperature] = self._softmax_weights.get(temperature, 0.0) + weight

    def add(self, gradient_NV: Tensor, scale: float | Tensor) -> None:
        """Add scale * a gradient of every logit, scale a number or (N, 1); the tensor is kept and may be written to."""
        self._dense.append((gradient_NV, scale))

    def add_rows(self, rows_M: Tensor, gradient_MV: Tensor) -> None:
        """Add a gradient of every logit of some rows, each of them once."""
        self._rows.append((rows_M, gradient_MV))

    def add_at(self, ids_NK: Tensor, gradient_NK: Tensor) -> None:
        """Add a gradient of some logits; an id may occur twice."""
        self._sparse.append((ids_NK, gradient_NK))

    def gradient(self) -> Tensor:
        """The gradient that the terms have left, (N, V). To be asked for last: log-probabilities are used up."""
        total_NV: Tensor | None = None
        for temperature, weight in self._softmax_weights.items():
            part_NV = self._log_q.pop(temperature).exp_().mul_(weight)
            total_NV = part_NV if total_NV is None else total_NV.add_(part_NV)
        for dense_NV, scale in self._dense:
            if total_NV is None:
                total_NV = dense_NV.mul_(scale)
            elif isinstance(scale, Tensor):
                total_NV.addcmul_(dense_NV, scale)
            else:
                total_NV.add_(dense_NV, alpha=scale)
        if total_NV is None:
            total_NV = torch.zeros_like(self.logits_NV)
        for rows_M, gradient_MV in self._rows:
            total_NV[rows_M] += gradient_MV
        for ids_NK, gradient_NK in self._sparse:
            total_NV.scatter_add_(-1, ids_NK, gradient_NK)
        return total_NV
