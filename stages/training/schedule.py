"""Learning rate and weight decay as pure functions of the step."""

import math

from tristill.stages.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of step `step`, counted from 0: linear warm-up to the peak, then the configured way down.

    cosine: Loshchilov and Hutter 2017, SGDR (arXiv 1608.03983), equation 5, one cycle. linear: straight to the end.
    trapezoid: constant, then linear over the last decay_fraction of the steps (Zhai et al. 2022, arXiv 2106.04560).
    All end at final_lr_fraction of the peak. In the second phase, if there is one, all of it times lr_fraction
    (Ma et al. 2024, The Era of 1-bit LLMs: Training Tips, Code and FAQ, figure 1c).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps))
    if config.schedule == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        remaining = 1 - progress
    else:
        decay_steps = max(1, round(config.decay_fraction * config.steps))
        remaining = min(1.0, (config.steps - 1 - step) / decay_steps)
    rate = config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * remaining)
    if config.second_phase is not None and step >= config.second_phase_step:
        rate *= config.second_phase.lr_fraction
    return rate


def weight_decay(config: TrainingConfig, step: int) -> float:
    """The decay of matrices at step `step`, counted from 0: the configured one for weight_decay_until of the steps.

    Zero from there on (Ma et al. 2024, The Era of 1-bit LLMs: Training Tips, Code and FAQ, figure 1d).
    """
    return config.weight_decay if step < config.decayed_steps else 0.0
