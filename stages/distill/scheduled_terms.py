"""The terms of the loss at every step: their weights and temperatures as scheduled."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tristill.stages.losses.build import make_term
from tristill.stages.losses.config import LossConfig
from tristill.stages.losses.schedule import AdaptiveTemperature, Temperature, value_at
from tristill.stages.losses.term import WeightedTerm
from tristill.stages.losses.terms_config import AnyTerm, AtTemperature


class ScheduledTerms(nn.Module):
    """Terms as a function of the step, and of how the loss went where a temperature adapts to it.

    The state of adaptive temperatures stands in buffers, which checkpoints keep.
    """

    temperatures_J: Tensor
    calm_steps_J: Tensor

    def __init__(self, config: LossConfig, steps: int, dump_temperature: float) -> None:
        super().__init__()
        self._config = config
        self._steps = steps
        self._dump_temperature = dump_temperature
        self._terms = config.terms
        seen = Counter(term.kind for term in self._terms)
        numbers: Counter[str] = Counter()
        self._labels = []
        for term in self._terms:
            numbers[term.kind] += 1
            self._labels.append(term.kind if seen[term.kind] == 1 else f"{term.kind}_{numbers[term.kind]}")
        starts = [t.start if isinstance(t := _temperature(term), AdaptiveTemperature) else 0.0 for term in self._terms]
        self.register_buffer("temperatures_J", torch.tensor(starts, dtype=torch.float64))
        self.register_buffer("calm_steps_J", torch.zeros(len(starts), dtype=torch.int64))

    @property
    def labels(self) -> list[str]:
        """What logs call the terms."""
        return self._labels

    def shares(self, step: int) -> dict[str, float]:
        """Weights of a step without tau^power; those of zero are left out."""
        weights = {label: self._weight(term, step) for label, term in zip(self._labels, self._terms, strict=True)}
        return {label: weight for label, weight in weights.items() if weight > 0}

    def at(self, step: int) -> list[WeightedTerm]:
        """The terms of a step, their weights with tau^power in them; those of weight zero are left out."""
        found = []
        for j, (settings, label) in enumerate(zip(self._terms, self._labels, strict=True)):
            weight = self._weight(settings, step)
            if weight == 0:
                continue
            temperature = self.temperature(j, step)
            scaled = weight * temperature**settings.temperature_power
            found.append(WeightedTerm(scaled, make_term(settings, temperature), label))
        return found

    def temperatures(self, step: int) -> dict[str, float]:
        """tau of every term that has one."""
        return {
            label: self.temperature(j, step)
            for j, (settings, label) in enumerate(zip(self._terms, self._labels, strict=True))
            if isinstance(settings, AtTemperature)
        }

    def temperature(self, j: int, step: int) -> float:
        """tau of the j-th term: its own, or that of the dump."""
        setting = _temperature(self._terms[j])
        if setting is None:
            return self._dump_temperature
        if isinstance(setting, AdaptiveTemperature):
            return float(self.temperatures_J[j])
        return value_at(setting, step, self._steps)

    def observe(self, values: Mapping[str, Tensor]) -> None:
        """Take note of the terms' values in a step that is done, where a temperature adapts to them."""
        for j, (settings, label) in enumerate(zip(self._terms, self._labels, strict=True)):
            setting = _temperature(settings)
            if isinstance(setting, AdaptiveTemperature) and label in values:
                before = float(self.temperatures_J[j]), int(self.calm_steps_J[j])
                self.temperatures_J[j], self.calm_steps_J[j] = setting.after(*before, float(values[label]))

    def _weight(self, settings: AnyTerm, step: int) -> float:
        if self._config.losses is not None:
            return value_at(settings.weight, step, self._steps)
        alpha = value_at(self._config.label_share, step, self._steps)
        return 1 - alpha if settings.needs_teacher else alpha


def _temperature(settings: AnyTerm) -> Temperature | None:
    return settings.temperature if isinstance(settings, AtTemperature) else None
