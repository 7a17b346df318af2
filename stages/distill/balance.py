"""Gradient norms of the terms of a loss: measured, warned of, and balanced.

Shapes: J terms.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tristill.stages.losses.selection_config import BalanceConfig
from tristill.stages.progress import say

_FAINT = 1e-3


class Balance(nn.Module):
    """Factors on the weights of terms such that the norms of their gradients are as their weights are.

    After Chen et al. 2018, GradNorm (arXiv 1711.02257), without its asymmetry: factor_j = mean norm / norm_j, norms
    taken at weight one, their mean weighted by the weights; smoothed in the logarithm over measurements. The factors
    stand in a buffer, which checkpoints keep.
    """

    log_factors_J: Tensor
    is_known_J: Tensor

    def __init__(self, config: BalanceConfig, labels: Sequence[str]) -> None:
        super().__init__()
        self._config = config
        self._labels = list(labels)
        self.register_buffer("log_factors_J", torch.zeros(len(labels), dtype=torch.float64))
        self.register_buffer("is_known_J", torch.zeros(len(labels), dtype=torch.bool))

    def factor(self, label: str) -> float:
        """What the weight of a term is multiplied by now."""
        return math.exp(float(self.log_factors_J[self._labels.index(label)]))

    def is_due(self, step: int) -> bool:
        """Whether norms are to be measured in this step."""
        return step % self._config.every == 0

    def observe(self, weights: Mapping[str, float], norms: Mapping[str, float]) -> None:
        """Take note of weights before any factor and tau^power, and of norms at weight one with tau^power in them."""
        known = {label: norm for label, norm in norms.items() if norm > 0 and weights.get(label, 0) > 0}
        if not known:
            return
        total = sum(weights[label] for label in known)
        mean = sum(weights[label] * norm for label, norm in known.items()) / total
        for label, norm in known.items():
            j = self._labels.index(label)
            kept = self._config.smoothing if bool(self.is_known_J[j]) else 0.0
            self.is_known_J[j] = True
            self.log_factors_J[j] = kept * self.log_factors_J[j] + (1 - kept) * math.log(mean / norm)


class FaintTerms:
    """Says once of a term that its gradient is less than a thousandth of another's."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def look(self, norms: Mapping[str, float]) -> None:
        """Warn of terms that hardly count, by the norms of their weighted gradients."""
        if not norms:
            return
        largest = max(norms, key=lambda label: norms[label])
        for label, norm in norms.items():
            if norm < _FAINT * norms[largest] and label not in self._said:
                self._said.add(label)
                say(
                    f"warning: the gradient of {label} ({norm:.2g}) is less than a thousandth of that of {largest} "
                    f"({norms[largest]:.2g}); raise its weight, or set distill.balance"
                )
