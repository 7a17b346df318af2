"""Learning rate as a pure function of the step."""

import math

from stages.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of step `step`, counted from 0: linear warm-up to the peak, then the configured way down.

    cosine: Loshchilov and Hutter 2017, SGDR (arXiv 1608.03983), equation 5, one cycle. trapezoid: constant, then
    linear over the last decay_fraction of the steps (Zhai et al. 2022, arXiv 2106.04560). Both end at
    final_lr_fraction of the peak.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
        remaining = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        decay_steps = max(1, round(config.decay_fraction * config.steps))
        remaining = min(1.0, (config.steps - 1 - step) / decay_steps)
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * remaining)
