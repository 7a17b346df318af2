"""Running means of a training between two records of `metrics.jsonl`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tristill.stages.losses.term import LossValues

_LOSS, _GRAD_NORM, _TERM = "loss", "grad_norm", "term."


class RunningMeans:
    """Means of the loss, its terms and the gradient norm over the steps since the last record, summed in float64.

    A step without any position that counts (chats) has a loss of exactly 0, says nothing, and is left out.
    """

    def __init__(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """`sums`: those of a checkpoint, so that a resumed training records what an uninterrupted one does."""
        self._sums = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in sums.items()}

    def add(self, values: LossValues, grad_norm: Tensor) -> None:
        """Count one step; nothing waits for the device."""
        is_counted = (values.total != 0).double()
        terms = {_TERM + name: term for name, term in values.terms.items()}
        step = {_LOSS: values.total, _GRAD_NORM: grad_norm, **terms}
        for name, value in step.items():
            pair = torch.stack([value.double(), torch.ones_like(value, dtype=torch.float64)]) * is_counted
            self._sums[name] = self._sums[name].to(pair.device) + pair if name in self._sums else pair

    def take(self) -> tuple[float, dict[str, float], float]:
        """(loss, terms, gradient norm) since the last call, which begins the next interval; zeros of no step."""
        means = {name: total / max(count, 1.0) for name, (total, count) in self.sums().items()}
        self._sums = {}
        terms = {name.removeprefix(_TERM): mean for name, mean in means.items() if name.startswith(_TERM)}
        return means[_LOSS], terms, means[_GRAD_NORM]

    def sums(self) -> dict[str, tuple[float, float]]:
        """Sum and number of steps of each, for a checkpoint."""
        return {name: (pair[0], pair[1]) for name, tensor in self._sums.items() for pair in [tensor.tolist()]}
