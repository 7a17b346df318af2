"""Teachers that move while the student learns: trained beside it, or a moving average of weights."""

import copy

import torch
from torch import Tensor, nn

from tristill.stages.collectives import means_of
from tristill.stages.distill.config import DistillConfig
from tristill.stages.distill.objective import Objective
from tristill.stages.losses.chunked_head import chunked_head_loss
from tristill.stages.losses.cross_entropy import CrossEntropy
from tristill.stages.losses.selection_config import OnlineConfig
from tristill.stages.losses.term import LossValues, WeightedTerm
from tristill.stages.models.checkpoint import new_model
from tristill.stages.models.description import Shape
from tristill.stages.models.language_model import LanguageModel, finite_features
from tristill.stages.models.transformer import Transformer
from tristill.stages.progress import say
from tristill.stages.quantize.config import quantization_strength
from tristill.stages.ranks import ALONE, Ranks
from tristill.stages.targets.online import OnlineSource
from tristill.stages.targets.source import Signals, TargetBatch, TargetSource, counted_by_all
from tristill.stages.training.loop import StepInfo


class MovingTeacher(nn.Module):
    """The models that give the targets: `trained` beside the student or None, `average` of weights or None.

    Co-training: Zhang et al. 2018, Deep Mutual Learning (arXiv 1706.00384), one way only: the teacher learns from the
    labels alone. Moving average: Tarvainen and Valpola 2017, Mean Teacher (arXiv 1703.01780).
    """

    num_steps: Tensor

    def __init__(self, config: OnlineConfig, student: LanguageModel, trained: LanguageModel | None) -> None:
        """`trained` is the teacher that config.co_train asks for, with its first weights."""
        super().__init__()
        self._decay = config.ema
        self.trained = trained
        self._averaged = (student if config.ema_of == "student" else trained,)  # not a part of this module
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self.average: LanguageModel | None = None
        if config.ema is not None:
            (averaged,) = self._averaged
            assert averaged is not None, "checked with the config"
            self.average = copy.deepcopy(averaged).requires_grad_(requires_grad=False)
            if averaged.quantize is not None and averaged.quantize.is_ternary:
                say(
                    "warning: distill.online.ema averages the latent weights of a ternary model; averaged latent "
                    "weights round to other trits than those that were trained, which is known to hurt"
                )

    @property
    def teacher(self) -> LanguageModel:
        """The model that gives the targets."""
        model = self.average or self.trained
        assert model is not None, "one of them is configured"
        return model

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average by one step: average = d * average + (1 - d) * weights.

        After n steps d = min(decay, 1 - 1 / (n + 1)), so that first weights do not outlast their use.
        """
        (averaged,) = self._averaged
        if self.average is None or averaged is None or self._decay is None:
            return
        self.num_steps += 1
        decay = min(self._decay, 1 - 1 / (int(self.num_steps) + 1))
        for mean, weight in zip(self.average.parameters(), averaged.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)


class CoTraining(nn.Module):
    """The student's objective on targets of a moving teacher, and the teacher's own loss."""

    def __init__(
        self,
        objective: Objective,
        moving: MovingTeacher,
        source: OnlineSource,
        learning_rate: float | None,
        ranks: Ranks = ALONE,
    ) -> None:
        """`learning_rate`: peak of the teacher that is trained; None for the student's."""
        super().__init__()
        self.objective = objective
        self.moving = moving
        self.source = source
        self._learning_rate = learning_rate
        self._ranks = ranks

    @classmethod
    def of(
        cls,
        student: LanguageModel,
        config: DistillConfig,
        source: TargetSource,
        teacher_shape: Shape,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> "CoTraining":
        """What config.online asks for; a teacher that is trained starts from random weights of the student's seed."""
        assert config.online is not None, "called only then"
        assert isinstance(source, OnlineSource), "moving teachers are online, as the config says"
        trained = None
        if config.online.co_train:
            trained = new_model(teacher_shape, source.vocab_size, None, config.training.seed)
        moving = MovingTeacher(config.online, student, trained).to(device)
        own = source.taught_by(moving.teacher)
        objective = Objective(student, config, own, ranks).to(device)
        return cls(objective, moving, own, config.online.learning_rate, ranks)

    @property
    def signals(self) -> Signals:
        """Windows alone: the teacher is forwarded here, as it is at that step."""
        return Signals()

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peaks of parameters that have one of their own, by the start of their names."""
        own = {f"objective.{name}": rate for name, rate in self.objective.learning_rates.items()}
        return own if self._learning_rate is None else {**own, "moving.trained.": self._learning_rate}

    @property
    def clipped_apart(self) -> list[nn.Module]:
        """What has a gradient norm of its own, the student first."""
        return [self.objective, *([self.moving.trained] if self.moving.trained else [])]

    @property
    def may_idle(self) -> bool:
        """See Objective; a teacher of transformers, too, may have weights that are not in use."""
        return self.objective.may_idle or not isinstance(self.moving.teacher, Transformer)

    def forward(self, batch: TargetBatch, info: StepInfo) -> LossValues:
        """The student's total plus the cross-entropy of the teacher that is trained; neither moves the other.

        Targets are computed outside of autocast, as those of any online teacher. Where the teacher's own loss is too,
        and its targets are not those of an average, one forward pass is enough.
        """
        average = self.moving.average
        if average is not None and average.quantize is not None:
            average.quantize_by(quantization_strength(average.quantize.warmup, info.step))
        trained, signals, device_type = self.moving.trained, self.objective.signals, batch.input_ids_BT.device.type
        gives_targets = self.moving.average is None and not torch.is_autocast_enabled(device_type)
        features = None
        if trained is not None:
            states = signals.states if gives_targets else ()
            features = finite_features(trained, batch.input_ids_BT, states, "the teacher trained beside the student")
        if features is not None and gives_targets:
            taught = self.source.with_features(batch, signals, features)
        else:
            with torch.autocast(device_type, enabled=False):
                taught = self.source.with_teacher(batch, signals)
        values = self.objective.forward(taught, info)
        if trained is None or features is None:
            return values
        final_ND = batch.counted(features.final_BTD)
        terms = [WeightedTerm(1.0, CrossEntropy(), "teacher_cross_entropy")]
        labels_N, divisor = batch.counted(batch.labels_BT), counted_by_all(batch, self._ranks) / self._ranks.world_size
        own = chunked_head_loss(final_ND, trained.head_weight, labels_N, None, terms, num_positions=divisor)
        telemetry = {what: dict(found) for what, found in values.telemetry.items()}
        if telemetry:
            telemetry["weights"]["teacher_cross_entropy"] = 1.0
            telemetry["weighted"] |= means_of(own.terms, self._ranks)
        return LossValues(values.total + own.total, {**values.terms, **own.terms}, telemetry)

    def after_step(self, values: LossValues) -> None:
        """Let schedules see the step that is done, and move the average."""
        self.objective.after_step(values)
        self.moving.follow()
