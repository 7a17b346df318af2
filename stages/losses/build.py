"""From the settings of a term to the term."""

from tristill.stages.losses.cross_entropy import CrossEntropy
from tristill.stages.losses.decoupled_kd import DecoupledKD
from tristill.stages.losses.forward_kl import ForwardKL
from tristill.stages.losses.logit_mse import LogitMSE
from tristill.stages.losses.mixtures import JensenShannon, SkewForwardKL, SkewReverseKL
from tristill.stages.losses.order import Ranking, Top1Hinge
from tristill.stages.losses.reverse_kl import AdaptiveKL, ReverseKL
from tristill.stages.losses.term import DistributionTerm
from tristill.stages.losses.terms_config import (
    AdaptiveKLSettings,
    AnyTerm,
    CrossEntropySettings,
    DecoupledKDSettings,
    ForwardKLSettings,
    JensenShannonSettings,
    LogitMSESettings,
    RankingSettings,
    ReverseKLSettings,
    SkewForwardKLSettings,
    SkewReverseKLSettings,
    Top1HingeSettings,
    TotalVariationSettings,
)
from tristill.stages.losses.total_variation import TotalVariation


def make_term(settings: AnyTerm, temperature: float) -> DistributionTerm:  # noqa: PLR0911 - one line per kind
    """The term of these settings, its targets read at `temperature`."""
    match settings:
        case CrossEntropySettings():
            return CrossEntropy()
        case ForwardKLSettings():
            return ForwardKL(temperature)
        case ReverseKLSettings():
            return ReverseKL(temperature)
        case JensenShannonSettings(beta=beta):
            return JensenShannon(temperature, beta)
        case SkewForwardKLSettings(skew=skew):
            return SkewForwardKL(temperature, skew)
        case SkewReverseKLSettings(skew=skew):
            return SkewReverseKL(temperature, skew)
        case AdaptiveKLSettings(head_mass=head_mass):
            return AdaptiveKL(temperature, head_mass)
        case TotalVariationSettings():
            return TotalVariation(temperature)
        case DecoupledKDSettings():
            return DecoupledKD(temperature, settings.alpha, settings.beta, settings.of)
        case LogitMSESettings():
            return LogitMSE(temperature)
        case RankingSettings(entries=entries):
            return Ranking(temperature, entries)
        case Top1HingeSettings(margin=margin):
            return Top1Hinge(margin)
