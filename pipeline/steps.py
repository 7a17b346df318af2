"""The steps, their artefacts and what each is made from.

    tokenize -> teacher -> dump-logits -> distill

A step knows its folder, the settings and inputs that its numbers depend on, and how to build. Everything heavy is
imported when a step builds, so that the command line answers without loading torch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cache import CacheCorruptError, CacheError, CacheMissingError, open_cache
from cache.hashing import fingerprint_of, sha256_of_file
from cache.manifest import load_manifest
from pipeline.config import DEFAULT_STUDENT, Config, save_config
from pipeline.errors import ConfigError
from pipeline.provenance import Provenance, read_provenance
from stages.data.config import SyntheticText

RUN_CONFIG_NAME = "config.toml"


@dataclass(frozen=True)
class Workspace:
    """One config and the folders of its run."""

    config: Config
    run_dir: Path

    @property
    def data(self) -> Path:
        """Tokens and tokenizer."""
        return self.run_dir / "data"

    @property
    def teacher(self) -> Path:
        """The teacher, as a Hugging Face folder."""
        return self.run_dir / "teacher"

    @property
    def cache(self) -> Path:
        """The cache, which may be shared between runs."""
        return self.config.cache.dir or self.run_dir / "cache"

    def __post_init__(self) -> None:
        """Refuse a run whose corpus would be written by what the run itself makes of it."""
        source = self.config.data.source
        if isinstance(source, SyntheticText) and source.model.expanduser().resolve().is_relative_to(
            self.run_dir.resolve()
        ):
            raise ConfigError(
                f"data.source.model: found {source.model}, which this run folder makes from the corpus itself; "
                "expected a model of another run, so use another --run-dir"
            )

    def student(self, name: str) -> Path:
        """One student."""
        return self.run_dir / "students" / name


class Step(ABC):
    """One artefact and how it is made."""

    command: ClassVar[str]
    artefact: ClassVar[str]
    """What inputs of later steps call it."""
    products: ClassVar[tuple[str, ...]]
    """Files without which the artefact is not there."""
    owned: ClassVar[tuple[str, ...]]
    """Patterns of all that a build may leave, to be removed by --force."""
    resumable: ClassVar[tuple[str, ...]]
    """Patterns of what an unfinished build can go on from."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.config = self.run_config = workspace.config

    @property
    def label(self) -> str:
        """The step as messages call it."""
        return self.command

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the artefact is."""

    @property
    @abstractmethod
    def needs(self) -> list["Step"]:
        """Steps whose artefacts this one reads."""

    @property
    def requires(self) -> list["Step"]:
        """Steps without whose artefacts it cannot start."""
        return self.needs

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What its numbers depend on."""

    @abstractmethod
    def build(self) -> str:
        """Make the artefact, or the rest of it; its fingerprint."""

    def inputs(self) -> dict[str, str]:
        """Fingerprints of what it is made from, as far as that is here."""
        known = {step.artefact: step.fingerprint() for step in self.needs}
        return {name: fingerprint for name, fingerprint in known.items() if fingerprint}

    def save_config(self) -> None:
        """Keep the config with the run."""
        save_config(self.run_config, self.workspace.run_dir / RUN_CONFIG_NAME)

    def provenance(self) -> Provenance | None:
        """The record in its folder."""
        return read_provenance(self.folder)

    def fingerprint(self) -> str | None:
        """The fingerprint of the finished artefact, None while there is none."""
        provenance = self.provenance()
        return provenance.fingerprint if provenance else None

    def is_complete(self) -> bool:
        """Whether the artefact was finished and its files are there."""
        return self.fingerprint() is not None and all((self.folder / name).is_file() for name in self.products)


class Tokenize(Step):
    """Corpus to token windows."""

    command = "tokenize"
    artefact = "data"
    products = ("data.json", "tokenizer.json", "train.npy", "validation.npy")
    owned = (*products, "synthetic", ".*.partial")
    resumable = ("synthetic/part-*.jsonl",)

    @property
    def folder(self) -> Path:
        """The tokens' folder."""
        return self.workspace.data

    @property
    def needs(self) -> list[Step]:
        """Nothing of ours."""
        return []

    def settings(self) -> dict[str, Any]:
        """The data section."""
        return {"data": self.config.data.numbers()}

    def inputs(self) -> dict[str, str]:
        """A sign of the files of the corpus, or of the model that writes it; nothing where they are not here."""
        from stages.data.files import corpus_signature

        signature = corpus_signature(self.config.data.source)
        return {"corpus": signature} if signature else {}

    def tokenizer_fingerprint(self) -> str | None:
        """SHA-256 of the tokenizer, if it is here."""
        path = self.folder / "tokenizer.json"
        return sha256_of_file(path) if path.is_file() else None

    def build(self) -> str:
        """Write token files and tokenizer."""
        from stages.data.tokenize import tokenize_corpus

        return tokenize_corpus(self.config.data, self.folder).fingerprint


class Teacher(Step):
    """Token windows to a trained teacher."""

    command = "teacher"
    artefact = "teacher"
    products = ("config.json", "model.safetensors", "tokenizer.json", "summary.json")
    owned = (*products, "tokenizer_config.json", "metrics.jsonl", "checkpoints", ".*.partial")
    resumable = ("checkpoints/step-*",)

    @property
    def folder(self) -> Path:
        """The teacher's folder."""
        return self.workspace.teacher

    @property
    def needs(self) -> list[Step]:
        """The tokens."""
        return [Tokenize(self.workspace)]

    def settings(self) -> dict[str, Any]:
        """The teacher section."""
        return {"teacher": self.config.teacher.numbers()}

    def build(self) -> str:
        """Train."""
        from stages.teacher.train import train_teacher

        return train_teacher(self.config.teacher, self.workspace.data, self.folder, self.config.evaluate).fingerprint


class DumpLogits(Step):
    """Teacher to cache."""

    command = "dump-logits"
    artefact = "cache"
    products = ("cache.json", "tokenizer.json")
    owned = (*products, "tables.h5", "train-*.h5", "validation-*.h5", ".*.partial")
    resumable = ("tables.h5", "train-*.h5", "validation-*.h5")

    @property
    def folder(self) -> Path:
        """The cache's folder."""
        return self.workspace.cache

    @property
    def needs(self) -> list[Step]:
        """Tokens and teacher."""
        return [Tokenize(self.workspace), Teacher(self.workspace)]

    def settings(self) -> dict[str, Any]:
        """The cache section."""
        return {"cache": self.config.cache.numbers()}

    def fingerprint(self) -> str | None:
        """Hash of the manifest, which holds the hash of every shard; the record of provenance may be missing."""
        try:
            return fingerprint_of(load_manifest(self.folder).model_dump(mode="json"))
        except (CacheMissingError, CacheCorruptError):
            return None

    def is_complete(self) -> bool:
        """Whether the manifest and every shard of its size are there, and no dump is at work on them."""
        provenance = self.provenance()
        if provenance and provenance.status == "building":
            return False
        try:
            open_cache(self.folder)
        except (CacheMissingError, CacheCorruptError):
            return False
        return True

    def build(self) -> str:
        """Forward the teacher over the windows that are missing."""
        from stages.dump.dump import dump_logits

        dump_logits(self.config.cache, self.workspace.data, self.workspace.teacher, self.folder)
        fingerprint = self.fingerprint()
        assert fingerprint is not None, "the manifest was just written"
        return fingerprint


class Distill(Step):
    """Cache, or teacher and tokens, to one student."""

    command = "distill"
    artefact = "student"
    products = ("config.json", "model.safetensors", "tokenizer.json", "summary.json")
    owned = Teacher.owned
    resumable = Teacher.resumable

    def __init__(self, workspace: Workspace, name: str) -> None:
        super().__init__(Workspace(workspace.config.for_student(name), workspace.run_dir))
        self.run_config = workspace.config
        self.name = name

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
    def needs(self) -> list[Step]:
        """The cache, unless targets are online; the teacher, if the student starts from it."""
        cached = self.config.distill.targets != "online"
        needs: list[Step] = [DumpLogits(self.workspace)] if cached else [Tokenize(self.workspace)]
        if not cached or self.config.student.init == "teacher":
            needs.append(Teacher(self.workspace))
        return needs

    @property
    def requires(self) -> list[Step]:
        """What online targets need; a cache says itself what is wrong with it."""
        return [Tokenize(self.workspace), Teacher(self.workspace)] if self.config.distill.targets == "online" else []

    def inputs(self) -> dict[str, str]:
        """Fingerprints of all that its targets can come from, as far as that is here."""
        steps: list[Step] = [Tokenize(self.workspace), Teacher(self.workspace)]
        if self.config.distill.targets != "online":
            steps.append(DumpLogits(self.workspace))
        known = {step.artefact: step.fingerprint() for step in steps}
        return {name: fingerprint for name, fingerprint in known.items() if fingerprint}

    def settings(self) -> dict[str, Any]:
        """The student's sections, with its shape resolved."""
        student = {**self.config.student.numbers(), "model": self.config.student_shape.numbers()}
        return {"student": student, "distill": {**self.config.distill.numbers(), "targets": self.targets()}}

    def targets(self) -> str:
        """Cached or online: what `auto` stands for here.

        Without a cache it is what the student was made with, or online.
        """
        if self.config.distill.targets != "auto":
            return self.config.distill.targets
        try:
            spec = load_manifest(self.workspace.cache).spec
        except CacheError:
            recorded = self.provenance()
            return str(recorded.settings["distill"]["targets"]) if recorded else "online"
        return "online" if self.config.distill.unserved_by(spec, self.config.student_shape.layers) else "cached"

    def build(self) -> str:
        """Train, evaluate and save the student."""
        from stages.distill.choose import Places, choose_source
        from stages.distill.distill import distill
        from stages.models.folder import pick_device

        tokens, teacher = Tokenize(self.workspace), Teacher(self.workspace)
        places = Places(
            cache=self.workspace.cache,
            data=tokens.folder,
            teacher=teacher.folder,
            teacher_fingerprint=teacher.fingerprint(),
            tokenizer_fingerprint=tokens.tokenizer_fingerprint(),
        )
        device = pick_device(self.config.distill.training.device)
        depth = self.config.student_shape.layers
        source = choose_source(self.config.distill, self.config.cache, depth, places, device)
        summary = distill(
            self.config.distill,
            self.config.student,
            self.config.student_shape,
            source,
            device,
            self.folder,
            teacher.folder,
            self.config.evaluate,
            self.inputs(),
        )
        return summary.fingerprints["student"]


def all_steps(workspace: Workspace) -> list[Step]:
    """Every step of a config, in order."""
    students = [Distill(workspace, name) for name in workspace.config.student_names]
    return [Tokenize(workspace), Teacher(workspace), DumpLogits(workspace), *students]
