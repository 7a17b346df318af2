"""The steps, their artefacts and what each is made from.

    tokenize -> teacher -> dump-logits -> distill           (the last two once for each stage of a chain)

A step knows its folder, the settings and inputs that its numbers depend on, and how to build. Everything heavy is
imported when a step builds, so that the command line answers without loading torch.
"""

from pathlib import Path
from typing import Any

from tristill.cache import CacheCorruptError, CacheError, CacheMissingError, CacheStoreError, open_cache
from tristill.cache.layout import COMPANION_NAMES
from tristill.cache.manifest import cache_fingerprint, load_manifest
from tristill.cache.remote import remote_copy
from tristill.pipeline.config import DEFAULT_STUDENT
from tristill.pipeline.errors import StaleError
from tristill.pipeline.reading import Input, cache_input, model_input, tokens_input
from tristill.pipeline.step import NOT_HERE, Step, fingerprints, known
from tristill.pipeline.tokenize_step import Tokenize
from tristill.pipeline.workspace import RUN_CONFIG_NAME, Workspace
from tristill.stages.models.description import CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_NAME, Shape, read_description
from tristill.stages.models.origin import ORIGIN_NAME, find_model, is_hub_name, known_fingerprint, load_origin
from tristill.stages.ranks import current_ranks
from tristill.stages.training.watch import Watch


class Teacher(Step):
    """Token windows, or a checkpoint that is given, to the run's teacher."""

    command = "teacher"
    products = (CONFIG_NAME, TOKENIZER_NAME, "summary.json")
    owned = (
        *products,
        WEIGHTS_NAME,
        ORIGIN_NAME,
        *COMPANION_NAMES,
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        ".*.partial",
    )
    resumable = ("checkpoints/step-*",)
    scratch = ("checkpoints",)
    fetched = ("checkpoint",)
    names_outside = ("teacher",)

    @property
    def folder(self) -> Path:
        """The folder of the run's teacher."""
        return self.workspace.run_dir / "teacher"

    @property
    def needs(self) -> dict[str, Step]:
        """The tokens."""
        return {"data": Tokenize(self.workspace)}

    def settings(self) -> dict[str, Any]:
        """The teacher section."""
        return {"teacher": self.config.teacher.numbers()}

    def inputs_here(self) -> dict[str, str]:
        """The tokens, and the checkpoint that is given, if it is here."""
        config = self.config.teacher
        given = None if config.path is None else find_model(config.path, config.revision, download=False)
        used = load_origin(self.folder)
        if given is None:
            is_used = used is not None and used.named == config.named
            if config.path is None or not is_hub_name(config.path) or is_used:
                return super().inputs_here()
            return {**super().inputs_here(), "checkpoint": f"{NOT_HERE}{config.named}"}
        if used is not None and used.folder == given.absolute() and used.is_unchanged():
            return {**super().inputs_here(), "checkpoint": used.fingerprint}  # weights may take minutes to read
        return super().inputs_here() | known({"checkpoint": known_fingerprint(given, config.dtype)})

    def reads(self) -> dict[str, Input]:
        """The tokens, and the model that is given."""
        config = self.config.teacher
        given = None if config.path is None else find_model(config.path, config.revision, download=False)
        own = {"data": tokens_input(self.workspace.data)}
        return own if given is None else {**own, "checkpoint": model_input(given, config.dtype)}

    def is_complete(self) -> bool:
        """See Step; the weights are here, or the folder says where they are."""
        return super().is_complete() and any((self.folder / name).is_file() for name in (WEIGHTS_NAME, ORIGIN_NAME))

    def shape(self) -> Shape:
        """The teacher's shape: of one that is given, as its copy here says, if there is one."""
        is_copied = self.config.teacher.path is not None and (self.folder / CONFIG_NAME).is_file()
        if not is_copied:
            self.workspace.refuse_outside("teacher")
        return read_description(self.folder).shape if is_copied else self.config.teacher.shape

    def build(self) -> str:
        """Train it, or copy the one that is given."""
        from tristill.stages.teacher.given import take_teacher
        from tristill.stages.teacher.train import train_teacher
        from tristill.stages.training.checkpoint import threads_of_checkpoint

        config, data, evaluate = self.config.teacher, self.workspace.data, self.config.evaluate
        if config.path is None:
            with threads_of_checkpoint(self.folder / "checkpoints", self.label):
                return train_teacher(config, data, self.folder, evaluate).fingerprint
        ranks, taken = current_ranks(), ""
        with ranks.agreeing():
            if ranks.is_first:
                taken = take_teacher(config, data, self.folder, self.config.cache.device, evaluate).fingerprint
        return str(ranks.from_first(taken))


def teacher_step(workspace: Workspace) -> Step:
    """The step that makes the teacher of a link: the run's, or the student of the link before."""
    return Teacher(workspace) if workspace.taught_by is None else Distill(workspace, workspace.taught_by)


class DumpLogits(Step):
    """Teacher to cache."""

    command = "dump-logits"
    products = ("cache.json", "tokenizer.json")
    owned = (*products, *COMPANION_NAMES, "tables.h5", "train-*.h5", "validation-*.h5", "test-*.h5", ".*.partial")
    resumable = ("tables.h5", "train-*.h5", "validation-*.h5", "test-*.h5")
    names_outside = ("cache",)

    @property
    def label(self) -> str:
        """The command, and the stage that the cache is for."""
        return (
            f"{self.command} --name {self.workspace.name}"
            if self.workspace.name in self.workspace.config.stages
            else self.command
        )

    @property
    def folder(self) -> Path:
        """The cache's folder."""
        return self.workspace.cache

    @property
    def needs(self) -> dict[str, Step]:
        """Tokens and teacher."""
        return {"data": Tokenize(self.workspace), "teacher": teacher_step(self.workspace)}

    def inputs_here(self) -> dict[str, str]:
        """Tokens, teacher, and the teachers beside it."""
        others = {f"teacher {n}": found.fingerprint for n, found in enumerate(self.config.cache.ensemble, start=2)}
        return super().inputs_here() | known(others)

    def models(self) -> tuple[Path, ...]:
        """The teacher of its link."""
        return (self.workspace.teacher,)

    def reads(self) -> dict[str, Input]:
        """Tokens, teacher, and the teachers beside it."""
        own = {"data": tokens_input(self.workspace.data), "teacher": model_input(self.workspace.teacher)}
        return own | {f"teacher {n}": model_input(m.path) for n, m in enumerate(self.config.cache.ensemble, start=2)}

    def teacher_fingerprint(self) -> str | None:
        """What its cache names the teacher, or the ensemble; None while one of them is not here."""
        own = teacher_step(self.workspace).fingerprint()
        if self.workspace.outside("cache.ensemble"):
            return None
        return own and self.config.cache.teacher_fingerprint(own)

    def settings(self) -> dict[str, Any]:
        """The cache section."""
        return {"cache": self.config.cache.numbers()}

    def fingerprint(self) -> str | None:
        """That of the cache itself; the record of provenance may be missing."""
        return cache_fingerprint(self.folder)

    def is_complete(self) -> bool:
        """Whether the manifest and every shard of its size are there, or at the URL, and no dump is at work on them."""
        provenance = self.provenance()
        if provenance and provenance.status == "building":
            return False
        try:
            opened = open_cache(self.folder)
        except (CacheMissingError, CacheCorruptError):
            return False
        copy = remote_copy(self.folder)
        return copy is None or not copy.lost_shards(opened.manifest)

    @property
    def is_copy(self) -> bool:
        """See Step."""
        return remote_copy(self.folder) is not None

    def refuse_force(self) -> None:
        """See Step; what is at a URL may be read by others."""
        copy = remote_copy(self.folder)
        if copy is not None and copy.is_begun():
            raise StaleError(
                f"{copy.store.url}: --force deletes nothing at a URL; delete the cache there yourself, or set "
                "cache.url to another place"
            )

    def build(self) -> str:
        """Forward the teacher over the windows that are missing."""
        return self.dump_into(self.folder)

    def dump_into(self, folder: Path) -> str:
        """Write the cache, or what is missing of it, into any folder; its fingerprint."""
        from tristill.stages.dump.dump import dump_logits

        return dump_logits(self.config.cache, self.workspace.data, self.workspace.teacher, folder)


class Distill(Step):
    """Cache, or teacher and tokens, to one student."""

    command = "distill"
    products = ("config.json", "model.safetensors", "tokenizer.json", "summary.json")
    owned = (*Teacher.owned, "co_teacher")
    resumable = Teacher.resumable
    scratch = Teacher.scratch
    fetched = ("student checkpoint",)
    names_outside = ("cache", "student", "distill")

    def __init__(self, workspace: Workspace, name: str) -> None:
        super().__init__(workspace.link(name))
        self.name = name
        self.watch: Watch | None = None

    def save_config(self) -> None:
        """Keep the config with the run, unless this is a variation of it: settings of its own are in its record."""
        if self.name == DEFAULT_STUDENT or not (self.workspace.run_dir / RUN_CONFIG_NAME).exists():
            super().save_config()

    @property
    def label(self) -> str:
        """The command and the student's name."""
        return f"{self.command} --name {self.name}"

    @property
    def folder(self) -> Path:
        """The student's folder."""
        return self.workspace.student(self.name)

    @property
    def _sources(self) -> dict[str, Step]:
        return {"data": Tokenize(self.workspace), "teacher": teacher_step(self.workspace)}

    @property
    def needs(self) -> dict[str, Step]:
        """The cache, unless targets are online; the teacher, if the student starts from it."""
        if self.config.distill.online is not None:
            own: dict[str, Step] = {"data": Tokenize(self.workspace)}
            return own | ({"teacher": teacher_step(self.workspace)} if self.config.student.init == "teacher" else {})
        if self.config.distill.targets == "online":
            return self._sources
        needs: dict[str, Step] = {"cache": DumpLogits(self.workspace)}
        if self.config.student.init == "teacher":
            needs["teacher"] = teacher_step(self.workspace)
        return needs

    @property
    def requires(self) -> dict[str, Step]:
        """What online targets need; a cache says itself what is wrong with it."""
        return self.needs if self.config.distill.targets == "online" else {}

    def inputs_here(self) -> dict[str, str]:
        """Fingerprints of all that its targets can come from, as far as that is here."""
        steps = self._sources if self.config.distill.online is None else self.needs
        if self.config.distill.targets != "online":
            steps["cache"] = DumpLogits(self.workspace)
        further = {f"cache {n}": cache_fingerprint(c.dir) for n, c in enumerate(self.config.distill.caches, start=2)}
        student = self.config.student
        given = known_fingerprint(student.folder) if student.init == "given" and student.folder else None
        return fingerprints(steps) | known({**further, "student checkpoint": given})

    def reads(self) -> dict[str, Input]:
        """What its targets come from, and the model that it starts from."""
        distill, student, workspace = self.config.distill, self.config.student, self.workspace
        is_online = self.targets() == "online"
        found = {"data": tokens_input(workspace.data)} if is_online else {"cache": cache_input(workspace.cache)}
        found |= {f"cache {n}": cache_input(further.dir) for n, further in enumerate(distill.caches, start=2)}
        if student.init == "teacher" or (is_online and distill.online is None):
            found["teacher"] = model_input(workspace.teacher)
        if student.init == "given" and student.folder:
            found["student checkpoint"] = model_input(student.folder)
        return found

    def shape(self) -> Shape:
        """The student's own shape, or its teacher's."""
        self.workspace.refuse_outside("student")
        return self.config.student.shape or Teacher(self.workspace).shape()

    def models(self) -> tuple[Path, ...]:
        """The teacher of its link, unless a cache stands in its place."""
        return () if self.targets() == "cached" and self.config.student.init != "teacher" else (self.workspace.teacher,)

    def settings(self) -> dict[str, Any]:
        """The student's sections, with its shape resolved."""
        student = {**self.config.student.numbers(), "model": self.shape().numbers()}
        targets = self.targets()
        distill = {**self.config.distill.numbers(), "targets": targets}
        if targets == "online":  # what a cache would say of itself
            cache = self.config.cache
            distill["windows"] = {
                "max_train_windows": cache.max_train_windows,
                "temperature": cache.profile.temperature,
                "hidden_stride": cache.hidden.stride,
                "shard_positions": cache.shard_positions,  # the order of windows goes by shards
            }
        shape = self._co_trained_shape()
        return {"student": student, "distill": distill} | ({"co_teacher": shape.numbers()} if shape else {})

    def _co_trained_shape(self) -> Shape | None:
        """The shape of a teacher that is trained beside the student; None if there is none."""
        online = self.config.distill.online
        return Teacher(self.workspace).shape() if online is not None and online.co_train else None

    def targets(self) -> str:
        """Cached or online: what `auto` stands for here.

        Without a cache it is what the student was made with, or online.
        """
        if self.config.distill.targets != "auto":
            return self.config.distill.targets
        if self.config.distill.caches:
            return "cached"
        try:
            spec = load_manifest(self.workspace.cache).spec
        except CacheStoreError:
            raise
        except CacheError:
            recorded = self.provenance()
            return str(recorded.settings["distill"]["targets"]) if recorded else "online"
        return "online" if self.config.distill.unserved_by(spec, self.shape().layers) else "cached"

    def build(self) -> str:
        """Train, evaluate and save the student."""
        from tristill.stages.distill.choose import Places, choose_source
        from tristill.stages.distill.distill import distill
        from tristill.stages.models.checkpoint import pick_device
        from tristill.stages.training.checkpoint import threads_of_checkpoint

        tokens, teacher = Tokenize(self.workspace), teacher_step(self.workspace)
        places = Places(
            cache=self.workspace.cache,
            data=tokens.folder,
            teacher=teacher.folder,
            teacher_fingerprint=DumpLogits(self.workspace).teacher_fingerprint(),
            tokenizer_fingerprint=tokens.tokenizer_fingerprint(),
        )
        device = pick_device(self.config.distill.training.device)
        depth = self.shape().layers
        config = self.config.distill
        if self.targets() == "cached":  # as its record says: a cache that loses a file from now on is an error
            config = config.model_copy(update={"targets": "cached"})
        source = choose_source(config, self.config.cache, depth, places, device)
        with threads_of_checkpoint(self.folder / "checkpoints", self.label):
            summary = distill(
                self.config.distill,
                self.config.student,
                self.shape(),
                source,
                device,
                self.folder,
                teacher.folder,
                self.config.evaluate,
                self.inputs(),
                self._co_trained_shape(),
                self.watch,
            )
        return summary.fingerprints["student"]


def all_steps(workspace: Workspace) -> list[Step]:
    """Every step of a config, in order."""
    steps: list[Step] = [Tokenize(workspace), Teacher(workspace)]
    for name in workspace.config.stages:
        steps += [DumpLogits(workspace.link(name)), Distill(workspace, name)]
    students = [Distill(workspace, name) for name in workspace.config.student_names]
    return [*steps, DumpLogits(workspace), *students]
