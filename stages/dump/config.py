"""Settings of the cache and of the dump that writes it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tristill.cache.hashing import fingerprint_of
from tristill.cache.layout import DEFAULT_SHARD_POSITIONS
from tristill.cache.profiles.heads import HeadSize
from tristill.cache.profiles.plain_topk import PlainTopKProfile
from tristill.cache.profiles.sampled import SampledProfile
from tristill.cache.profiles.topk import Temperatures, TopKProfile
from tristill.cache.store import check_url
from tristill.stages.dump.ensemble_config import EnsembleMember
from tristill.stages.dump.hidden_config import HiddenSettings
from tristill.stages.settings import OUTSIDE, Section, neutral, normalised

MEASURED_POSITIONS = 12_288
"""About so many positions of the calibration are measured on, which are not fitted on."""


class TransformSettings(Section):
    """The full distribution, transform coded; its rank and basis come from the calibration."""

    kind: Annotated[Literal["transform"], Field(description="name of the profile")] = "transform"
    step: Annotated[
        float,
        Field(gt=0, le=100, description="step of the coefficients, in nats of logit; larger: fewer bytes, coarser"),
    ] = 0.2
    coded_above: Annotated[
        float,
        Field(ge=0, le=10, description="a coefficient is coded if its deviation is more than this many steps"),
    ] = 0.1
    head: Annotated[HeadSize, Field(description="which logits are kept exactly beside it")] = HeadSize()
    temperatures: Temperatures = (1.0, 2.0, 5.0)
    dither: Annotated[
        bool, Field(description="subtractive dither, which makes the error independent of the logits")
    ] = True
    seed: Annotated[int, Field(ge=0, description="seed of the dither, beside the position's place")] = 0

    @property
    def temperature(self) -> float:
        """tau_dump: the lowest declared temperature."""
        return self.temperatures[0]


class DenseSettings(Section):
    """The final hidden state in 8 bits and the output matrix once: as good as online."""

    kind: Annotated[Literal["dense"], Field(description="name of the profile")] = "dense"
    temperature: Annotated[
        float, Field(gt=0, le=1000, description="what a student takes that names no temperature; any is served")
    ] = 1.0


ProfileSettings = Annotated[
    SampledProfile | TopKProfile | TransformSettings | DenseSettings | PlainTopKProfile, Field(discriminator="kind")
]


def within_vocabulary(settings: ProfileSettings, vocab_size: int) -> ProfileSettings:
    """The same settings, with no more entries kept than there are ids."""
    if isinstance(settings, PlainTopKProfile):
        return settings.model_copy(update={"top_k": min(settings.top_k, vocab_size)})
    if isinstance(settings, TopKProfile | TransformSettings):
        size = settings.head
        entries = {"min_entries": min(size.min_entries, vocab_size), "max_entries": min(size.max_entries, vocab_size)}
        return settings.model_copy(update={"head": size.model_copy(update=entries)})
    return settings


_Temperature = Annotated[float, Field(gt=0, le=1000)]
_Degrees = Annotated[float, Field(gt=0, le=180)]


class FidelityConfig(Section):
    """What the cache must achieve; the dump measures and picks the cheapest setting of the profile that does.

    The setting that is picked: `step` and `head.probability` of `transform`, `draws` of `sampled`, `head.probability`
    of `topk`. Angles are measured on a student that is the teacher with 15% noise on its weights: a hard case, since
    the nearer a student is, the smaller its gradient beside the error.
    """

    max_gradient_angle_deg: Annotated[
        dict[_Temperature, _Degrees] | None,
        Field(
            min_length=1,
            description="temperature = largest angle in degrees between the mean gradients from the cache and from the "
            "full distribution, over 12,288 positions",
        ),
    ] = None
    bytes_per_position: Annotated[
        float | None,
        Field(
            gt=0,
            description="bytes of targets, ids, signals and tables, not of hidden states; the smallest worst angle "
            "within them is taken",
        ),
    ] = None

    @model_validator(mode="after")
    def _one_target(self) -> "FidelityConfig":
        if (self.max_gradient_angle_deg is None) == (self.bytes_per_position is None):
            raise ValueError("give one of max_gradient_angle_deg and bytes_per_position")
        return self

    def __str__(self) -> str:
        """The target in words."""
        if self.bytes_per_position is not None:
            return f"at most {self.bytes_per_position:g} bytes/position"
        assert self.max_gradient_angle_deg is not None
        angles = (f"{angle:g} degrees at tau {tau:g}" for tau, angle in sorted(self.max_gradient_angle_deg.items()))
        return "at most " + ", ".join(angles)


class DumpConfig(Section):
    """What the teacher's knowledge is kept as, and where."""

    dir: Annotated[Path | None, OUTSIDE, neutral("folder of the cache; none is `cache` in the run folder")] = None
    url: Annotated[
        str | None,
        OUTSIDE,
        neutral(
            "where the cache is, such as s3://bucket/folder, of which `dir` is then the local copy; none: in `dir`"
        ),
    ] = None
    local_bytes: Annotated[
        int | None, neutral("bytes of shards kept in `dir` at most, where there is a `url`; none keeps all", ge=1)
    ] = None
    profile: Annotated[ProfileSettings, Field(description="what is kept at each position")] = SampledProfile()
    fidelity: Annotated[
        FidelityConfig | None,
        Field(description="a target instead of settings of the profile; none takes the profile's settings as they are"),
    ] = None
    calibration_windows: Annotated[
        int, Field(ge=1, description="windows of the train split that tables and models of the coder are fitted on")
    ] = 256
    hidden_layers: Annotated[
        tuple[int, ...],
        Field(description="blocks whose outputs are kept too, by number from 1 (0 is the embedding); none keeps none"),
    ] = ()
    hidden: Annotated[HiddenSettings, Field(description="how they are kept")] = HiddenSettings()
    ensemble: Annotated[
        tuple[EnsembleMember, ...],
        Field(
            description="further teachers, whose distributions are mixed with that of the run's own; hidden states "
            "remain those of the run's own"
        ),
    ] = ()
    own_weight: Annotated[float, Field(gt=0, description="weight of the run's own teacher beside them")] = 1.0
    max_train_windows: Annotated[
        int | None, Field(ge=1, description="windows of the train split that students see; none takes all")
    ] = None
    shard_positions: Annotated[int, Field(ge=1, description="positions per shard, about")] = DEFAULT_SHARD_POSITIONS
    batch_windows: Annotated[int, Field(ge=1, description="windows per forward pass of the teacher")] = 16
    precision: Annotated[
        Literal["float32", "bfloat16"], Field(description="bfloat16: matrix products of the teacher under autocast")
    ] = "float32"
    compression_level: Annotated[int, Field(ge=1, le=22, description="Zstandard level")] = 3
    device: Annotated[str | None, neutral("cpu, cuda, cuda:1 ..; none takes CUDA if there is one")] = None

    @field_validator("url")
    @classmethod
    def _url_is_plain(cls, url: str | None) -> str | None:
        return url if url is None else check_url(url)

    @field_validator("hidden_layers")
    @classmethod
    def _layers_are_distinct(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) != len(layers) or any(layer < 0 for layer in layers):
            raise ValueError("layers must be distinct and not negative")
        return tuple(sorted(layers))

    @model_validator(mode="after")
    def _the_embedding_is_a_residual(self) -> "DumpConfig":
        if 0 in self.hidden_layers and self.hidden.output != "residual":
            raise ValueError(f"hidden_layers: layer 0 is the embedding and has no output {self.hidden.output!r}")
        return self

    @model_validator(mode="after")
    def _a_mixture_has_no_hidden_state(self) -> "DumpConfig":
        if self.ensemble and isinstance(self.profile, TransformSettings | DenseSettings):
            raise ValueError(
                f"ensemble: profile {self.profile.kind} keeps the final hidden state of one teacher, and a mixture of "
                "several has none; use profile sampled, topk or plain_topk, or dump a cache of each teacher and mix "
                "them with distill.caches"
            )
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all teachers, the run's own first; they sum to one."""
        return normalised((self.own_weight, *(member.weight for member in self.ensemble)))

    def teacher_fingerprint(self, own: str) -> str | None:
        """What the cache names its teachers, for the fingerprint of the run's own; None if another one is not here."""
        if not self.ensemble:
            return own
        found = [own, *(member.fingerprint for member in self.ensemble)]
        return None if None in found else fingerprint_of(list(zip(found, self.shares, strict=True)))

    def numbers(self) -> dict[str, Any]:
        """See Section. Of an ensemble the shares count; one teacher is all that there is."""
        plain = super().numbers()
        del plain["own_weight"], plain["ensemble"]
        return {**plain, "ensemble": list(self.shares)} if self.ensemble else plain
