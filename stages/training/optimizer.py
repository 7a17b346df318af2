"""AdamW over a module's named parameters."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from tristill.stages.training.config import TrainingConfig


def make_optimizer(
    module: nn.Module, config: TrainingConfig, learning_rates: Mapping[str, float] = MappingProxyType({})
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on vectors (norms).

    learning_rates: peaks of parameters whose names start so. A group's `peak_ratio` is its peak over the config's; the
    schedule is the same for all. A group's `decays` says whether weight decay is for it. Loshchilov
    and Hutter 2019, Decoupled Weight Decay Regularization (arXiv 1711.05101).
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            own = [rate for prefix, rate in learning_rates.items() if name.startswith(prefix)]
            peak_ratio = own[0] / config.learning_rate if own else 1.0
            groups.setdefault((parameter.ndim >= 2, peak_ratio), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": parameters,
                "decays": decays,
                "weight_decay": config.weight_decay if decays else 0.0,
                "peak_ratio": ratio,
            }
            for (decays, ratio), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    optimizer.register_step_post_hook(_count_the_writes)
    return optimizer


def _count_the_writes(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The fused step writes to parameters without counting it, and quantised layers look at the count."""
    for group in optimizer.param_groups:
        increment_version(group["params"])
