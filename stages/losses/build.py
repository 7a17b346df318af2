"""From the settings of a term to the term."""

from stages.losses.cross_entropy import CrossEntropy
from stages.losses.decoupled_kd import DecoupledKD
from stages.losses.forward_kl import ForwardKL
from stages.losses.logit_mse import LogitMSE
from stages.losses.mixtures import JensenShannon, SkewForwardKL, SkewReverseKL
from stages.losses.order import Ranking, Top1Hinge
from stages.losses.reverse_kl import AdaptiveKL, ReverseKL
from stages.losses.term import DistributionTerm
from stages.losses.terms_config import (
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
from stages.losses.total_variation import TotalVariation


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
