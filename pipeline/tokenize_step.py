"""The step `tokenize`."""

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tristill.cache.hashing import sha256_of_file
from tristill.cache.layout import COMPANION_NAMES
from tristill.pipeline.reading import Input
from tristill.pipeline.step import Step, known
from tristill.stages.data.config import SyntheticText
from tristill.stages.errors import CheckpointError
from tristill.stages.models.origin import find_model


class Tokenize(Step):
    """Corpus to token windows."""

    command = "tokenize"
    products = ("data.json", "tokenizer.json", "train.npy", "validation.npy")
    owned = (*products, *COMPANION_NAMES, "test.npy", "*-mask.npy", "synthetic", ".*.partial")
    resumable = ("synthetic/part-*.jsonl",)
    fetched = ("corpus", "validation corpus", "test corpus", "chat template")
    names_outside = ("data",)

    @property
    def folder(self) -> Path:
        """The tokens' folder."""
        return self.workspace.data

    @property
    def needs(self) -> dict[str, Step]:
        """Nothing of ours."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The data section."""
        return {"data": self.config.data.numbers()}

    def inputs_here(self) -> dict[str, str]:
        """A sign of the files of the corpus, or of the model that writes it; nothing where they are not here.

        Of chats, also of the tokenizer and its chat template.
        """
        from tristill.stages.data.files import corpus_signature, template_signature

        data = self.config.data
        held_out = {f"{split} corpus": corpus_signature(source) for split, source in data.held_out.items()}
        found = {"corpus": corpus_signature(data.source), "chat template": template_signature(data)}
        return known(found | held_out)

    def reads(self) -> dict[str, Input]:
        """Folders of models that it opens; all files of the corpus are compared while they are read."""
        from tristill.stages.data.files import template_folder, template_signature

        data, found = self.config.data, {}
        if isinstance(data.source, SyntheticText):
            found["corpus"] = Input((data.source.model.expanduser(),), lambda _: self.inputs().get("corpus"))
        if (folder := template_folder(data)) is not None:
            found["chat template"] = Input((folder,), lambda _: template_signature(data))
        return found

    def tokenizer_fingerprint(self) -> str | None:
        """SHA-256 of the tokenizer, if it is here."""
        path = self.folder / "tokenizer.json"
        return sha256_of_file(path) if path.is_file() else None

    def build(self) -> str:
        """Write token files and tokenizer."""
        from tristill.stages.data.files import refuse_changed_corpus
        from tristill.stages.data.tokenize import tokenize_corpus

        self._refuse_other_tokenizer()
        with ExitStack() as stack:
            for source in (self.config.data.source, *self.config.data.held_out.values()):
                stack.enter_context(refuse_changed_corpus(source))
            return tokenize_corpus(self.config.data, self.folder).fingerprint

    def _refuse_other_tokenizer(self) -> None:
        """Refuses what the step `teacher` would, as far as the tokenizer of a given teacher is here to be seen."""
        from tristill.stages.data.tokenizer_gate import refuse_other_tokenizer

        teacher, model = self.config.teacher, None
        if teacher.path is not None and not self.workspace.outside("teacher"):
            with suppress(CheckpointError):  # told by that step
                model = find_model(teacher.path, teacher.revision, download=True, weights=False)
        if teacher.path is not None and model is not None:
            refuse_other_tokenizer(self.config.data.tokenizer, model, teacher.path)
