"""Settings of the student and its distillation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tristill.cache.hidden import HiddenOutput
from tristill.cache.spec import CacheSpec
from tristill.stages.distill.caches_config import FurtherCache
from tristill.stages.losses.config import LossConfig
from tristill.stages.losses.hidden_config import resolved_layers
from tristill.stages.losses.selection_config import CurriculumConfig, OnlineConfig
from tristill.stages.models.description import ModelConfig, Shape, read_description
from tristill.stages.models.origin import fetch_model, find_model
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.settings import OUTSIDE, Section, neutral, normalised
from tristill.stages.training.config import TrainingConfig


class StudentConfig(Section):
    """The model that is distilled."""

    newer = ("path",)

    model: Annotated[
        ModelConfig | None,
        Field(
            description="its shape, of our own transformer; none takes that of path, or the teacher's. --set of one "
            "field of an absent shape changes that field of the teacher's"
        ),
    ] = None
    path: Annotated[
        Path | None,
        OUTSIDE,
        neutral(
            "a model whose architecture the student has, and whose weights too with init = 'given': a folder of ours, "
            "one of transformers, or a name on the hub. A plain Llama becomes one of our own transformer"
        ),
    ] = None
    revision: Annotated[str | None, neutral("of a model on the hub: branch, tag or commit; none is main")] = None
    quantize: Annotated[QuantizeConfig, Field(description="how its linear layers are quantised")] = QuantizeConfig()
    init: Annotated[
        Literal["random", "teacher", "given"],
        Field(description="first weights; teacher needs the teacher's folder and its shape; given takes those at path"),
    ] = "random"

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.model is not None and self.path is not None:
            raise ValueError("give model (a shape of our own transformer) or path (a model that has it); found both")
        if self.init == "given" and self.path is None:
            raise ValueError("init = 'given' takes the weights at path, and found no path; set it, or another init")
        if self.revision is not None and self.path is None:
            raise ValueError("revision: is of a model on the hub, and found no path; leave it out")
        return self

    @property
    def folder(self) -> Path | None:
        """The model that path names, if it is on this machine."""
        return None if self.path is None else find_model(self.path, self.revision, download=False)

    @property
    def shape(self) -> Shape | None:
        """Its own; None for the teacher's. Raises CheckpointError if it is at a path where no model is."""
        if self.path is None:
            return self.model
        return read_description(fetch_model(self.path, self.revision, weights=False)).shape


class DistillConfig(LossConfig):
    """The student's loss, where its targets come from, and its training."""

    targets: Annotated[
        Literal["cached", "online", "auto"],
        neutral(
            "cached: from the cache or not at all; online: forward the teacher at every step, which takes many times "
            "as long; auto: cached if it serves, else online"
        ),
    ] = "cached"
    caches: Annotated[
        tuple[FurtherCache, ...],
        Field(
            description="further caches, whose targets are mixed with those of the run's own as they are read; hidden "
            "states and entropies remain those of the run's own"
        ),
    ] = ()
    own_weight: Annotated[float, Field(gt=0, description="weight of the run's own cache beside them")] = 1.0
    online: Annotated[
        OnlineConfig | None, Field(description="teachers that move with the student; none is the frozen one")
    ] = None
    curriculum: Annotated[
        CurriculumConfig | None, Field(description="windows from easy to hard; none takes all from the start")
    ] = None
    training: Annotated[TrainingConfig, Field(description="how the student is trained")]

    @model_validator(mode="after")
    def _moving_teachers_are_online(self) -> Self:
        if self.online is not None and self.targets != "online":
            raise ValueError("a teacher that is trained beside the student is no cache: set targets = 'online'")
        return self

    @model_validator(mode="after")
    def _moving_teachers_are_whole(self) -> Self:
        if self.online is not None and self.training.parallel == "fsdp":
            raise ValueError(
                "a teacher that moves with the student is not shared out among ranks: set training.parallel = 'ddp'"
            )
        return self

    @model_validator(mode="after")
    def _caches_are_read(self) -> Self:
        if self.caches and self.targets == "online":
            raise ValueError(
                "caches: are not read when targets = 'online', which forwards the run's own teacher alone; set "
                "targets = 'cached', or leave caches out"
            )
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all caches, the run's own first; they sum to one."""
        return normalised((self.own_weight, *(cache.weight for cache in self.caches)))

    def numbers(self) -> dict[str, Any]:
        """See Section. Of several caches the shares count; one cache is all that there is."""
        plain = super().numbers()
        del plain["own_weight"], plain["caches"]
        return {**plain, "caches": list(self.shares)} if self.caches else plain

    def hidden_layers(
        self, student_depth: int, known: Mapping[HiddenOutput, tuple[int, ...]]
    ) -> dict[HiddenOutput, tuple[int, ...]]:
        """The teacher's layers whose states are compared, ascending, by output; `known` are those that there are."""
        wanted: dict[HiddenOutput, tuple[int, ...]] = {}
        if self.hidden is not None and self.hidden.weight > 0:
            found = resolved_layers(self.hidden.layers, student_depth, known.get(self.hidden.output, ()))
            wanted[self.hidden.output] = tuple(sorted(set(found.values())))
        if self.relations is not None and self.relations.weight > 0:
            found = resolved_layers(self.relations.layers, student_depth, known.get("qkv", ()))
            wanted["qkv"] = tuple(sorted(set(found.values())))
        return wanted

    def unserved_by(self, spec: CacheSpec, student_depth: int) -> list[str]:
        """Reasons why a student of so many blocks cannot be trained from a cache; empty when it can."""
        known = {spec.hidden.output: spec.hidden.layers} if spec.hidden else {}
        return spec.unserved(
            self.needs(spec.profile.temperature),
            self.hidden_layers(student_depth, known),
            signals=self.needs_entropy or self.curriculum is not None,
        )
