"""Windows from easy to hard, by what the cache knows of the teacher there."""

import math

import numpy as np

from tristill.cache.order import Pacing
from tristill.stages.errors import TargetsError
from tristill.stages.losses.selection_config import CurriculumConfig
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.source import TargetSource
from tristill.stages.training.config import TrainingConfig

_STEPS = 5


def pacing_of(config: CurriculumConfig, training: TrainingConfig, source: TargetSource) -> Pacing:
    """What of the source's train windows is seen in each batch of a training.

    Bengio et al. 2009, Curriculum Learning; pacing `root` is the competence of Platanios et al. 2019 (arXiv
    1903.09848), equation 7. Among the windows that are seen the order is that of an epoch without a curriculum.
    """
    if not isinstance(source, CachedSource):
        raise TargetsError("distill.curriculum: needs the teacher's entropies of all windows, which a cache holds")
    signals = source.mean_signals("train")
    difficulty_W = signals["teacher_entropy"] if config.by == "entropy" else -signals["label_log_prob"]
    rank_W = np.empty(len(difficulty_W), np.int64)
    rank_W[np.argsort(difficulty_W, kind="stable")] = np.arange(len(difficulty_W))
    batches = training.steps * training.accumulation
    return Pacing(rank_W, lambda batch: share_seen(config, batch / batches), training.batch_windows)


def share_seen(config: CurriculumConfig, progress: float) -> float:
    """The share of the windows that is seen when this share of the training is done."""
    done = min(1.0, progress / config.until)
    if config.pacing == "root":
        return math.sqrt(config.start**2 + (1 - config.start**2) * done)
    if config.pacing == "step":
        done = math.floor(done * _STEPS) / _STEPS
    return config.start + (1 - config.start) * done
