"""The student and its loss as one trainable module."""

from torch import nn

from stages.distill.config import DistillConfig
from stages.errors import TargetsError
from stages.losses.chunked_head import chunked_head_loss
from stages.losses.cross_entropy import CrossEntropy
from stages.losses.forward_kl import ForwardKL
from stages.losses.hidden_mse import HiddenMSE
from stages.losses.term import LossValues, WeightedTerm
from stages.models.transformer import Transformer
from stages.targets.source import TargetBatch, TargetSource


def weighted_terms(alpha: float, temperature: float) -> list[WeightedTerm]:
    """alpha * CE + (1 - alpha) * tau^2 * KL(p_tau || q_tau), without the terms of weight zero.

    Hinton et al. 2015 (arXiv 1503.02531), section 2. Multiplying by tau^2 keeps the KL term's gradient, which falls as
    1 / tau^2, at the scale of the cross-entropy's.
    """
    terms = []
    if alpha > 0:
        terms.append(WeightedTerm(alpha, CrossEntropy()))
    if alpha < 1:
        terms.append(WeightedTerm((1 - alpha) * temperature**2, ForwardKL(temperature)))
    return terms


class Objective(nn.Module):
    """Holds the student and, for the loss on hidden states, its projections; all of them are trained."""

    def __init__(self, student: Transformer, config: DistillConfig, source: TargetSource) -> None:
        super().__init__()
        self.student = student
        self._terms = weighted_terms(config.alpha, config.temperature or source.temperature)
        self.hidden_mse: HiddenMSE | None = None
        if config.hidden is not None and config.layer_map:
            if beyond := [layer for layer in config.layer_map if not 0 <= layer <= student.config.layers]:
                raise TargetsError(
                    f"distill.hidden.layers: found student layers {beyond}, but the student has "
                    f"{student.config.layers} blocks"
                )
            assert source.teacher_width is not None, "a source is chosen for the signals that the losses need"
            self.hidden_mse = HiddenMSE(config.layer_map, student.config.width, source.teacher_width)
            self._hidden_weight = config.hidden.weight

    def forward(self, batch: TargetBatch) -> LossValues:
        """The weighted total and every term of a batch."""
        features = self.student(batch.input_ids_BT, self.hidden_mse.layers if self.hidden_mse else ())
        final_ND = features.final_BTD.flatten(0, 1)
        values = chunked_head_loss(
            final_ND, self.student.head_weight, batch.labels_BT.flatten(), batch.targets, self._terms
        )
        if self.hidden_mse is None:
            return values
        error = self.hidden_mse(features.hidden, batch.hidden, batch.hidden_stride)
        return LossValues(
            values.total + self._hidden_weight * error, {**values.terms, self.hidden_mse.name: error.detach()}
        )
