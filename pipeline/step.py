"""What a step of a run is: an artefact, what it is made from, and how it is built."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tristill.cache.layout import TOKENIZER_NAME
from tristill.cache.regular_file import read_json_object
from tristill.pipeline.config import save_config
from tristill.pipeline.provenance import Provenance, read_provenance
from tristill.pipeline.reading import Input
from tristill.pipeline.workspace import RUN_CONFIG_NAME, Workspace
from tristill.stages.models.origin import refuse_untrusted_record

COMMANDS_ON_RANKS = ("teacher", "dump-logits", "distill")
"""Commands of the heavy steps, which many processes can work on together."""
NOT_HERE = "not on this machine: "
"""Begins what is known of an input that is still to be fetched, in place of its fingerprint."""


class Step(ABC):
    """One artefact and how it is made."""

    command: ClassVar[str]
    products: ClassVar[tuple[str, ...]]
    """Files without which the artefact is not there."""
    owned: ClassVar[tuple[str, ...]]
    """Patterns of all that a build may leave, to be removed by --force."""
    resumable: ClassVar[tuple[str, ...]]
    """Patterns of what an unfinished build can go on from."""

    names_outside: ClassVar[tuple[str, ...]]
    """Tables of the config that may name what is read from elsewhere to build it."""
    scratch: ClassVar[tuple[str, ...]] = ()
    """Patterns of what nobody needs once the artefact is complete."""
    fetched: ClassVar[tuple[str, ...]] = ()
    """Names of inputs that a build may bring to this machine, so that their fingerprints are known only after it."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.config = workspace.config.for_student(workspace.name)

    @property
    def label(self) -> str:
        """The step as messages call it: the words of its command."""
        return self.command

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the artefact is."""

    @property
    @abstractmethod
    def needs(self) -> dict[str, "Step"]:
        """Steps whose artefacts this one reads, by what it takes each for."""

    @property
    def requires(self) -> dict[str, "Step"]:
        """Steps without whose artefacts it cannot start."""
        return self.needs

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What its numbers depend on."""

    @abstractmethod
    def build(self) -> str:
        """Make the artefact, or the rest of it; its fingerprint."""

    def inputs(self) -> dict[str, str]:
        """Fingerprints of what it is made from, as far as that is here and may be read: see `refuse_outside`."""
        return fingerprints(self.needs) if self.workspace.outside(*self.names_outside) else self.inputs_here()

    def inputs_here(self) -> dict[str, str]:
        """Fingerprints of what it is made from, as far as that is here."""
        return fingerprints(self.needs)

    def reads(self) -> dict[str, Input]:
        """What a build opens, by its name among the inputs; a record may tell of further ones, which that came from."""
        return {}

    @property
    def is_copy(self) -> bool:
        """Whether its folder only keeps what is at a URL, so that no record needs to be there."""
        return False

    def models(self) -> tuple[Path, ...]:
        """Folders of models of the run that are loaded to build it."""
        return ()

    def refuse_outside(self) -> None:
        """Raise an error if building it takes what a run folder that may come from anybody names outside of itself."""
        self.workspace.refuse_outside(*self.names_outside)
        for folder in self.models():
            refuse_untrusted_record(folder)

    def refuse_force(self) -> None:  # noqa: B027 - most can
        """Raise StaleError if `--force` cannot build it anew."""

    def save_config(self) -> None:
        """Keep the config with the run."""
        save_config(self.workspace.config, self.workspace.run_dir / RUN_CONFIG_NAME)

    def provenance(self) -> Provenance | None:
        """The record in its folder."""
        return read_provenance(self.folder)

    def fingerprint(self) -> str | None:
        """The fingerprint of the finished artefact, None while there is none."""
        provenance = self.provenance()
        return provenance.fingerprint if provenance else None

    def is_complete(self) -> bool:
        """Whether the artefact was finished and its files are there."""
        return self.fingerprint() is not None and all(_is_whole(self.folder / name) for name in self.products)


def _is_whole(product: Path) -> bool:
    """Whether a file is there and, if it is JSON of ours, can be read: a torn one is not taken for finished."""
    if product.suffix != ".json" or product.name == TOKENIZER_NAME:
        return product.is_file()
    try:
        return bool(read_json_object(product))
    except (OSError, ValueError):
        return False


def fingerprints(steps: Mapping[str, Step]) -> dict[str, str]:
    """Those of the artefacts that are finished."""
    return known({name: step.fingerprint() for name, step in steps.items()})


def known(fingerprints: Mapping[str, str | None]) -> dict[str, str]:
    """Those that are not None."""
    return {name: fingerprint for name, fingerprint in fingerprints.items() if fingerprint}
