"""Whether a format can hold a student, most of which is known before it is trained."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from tristill.stages.errors import ExportError, StageError
from tristill.stages.export.bitnet import refuse_bitnet
from tristill.stages.export.formats import ExportFormat
from tristill.stages.export.gguf import refuse_gguf
from tristill.stages.export.gguf_tokenizer import refuse_gguf_tokenizer
from tristill.stages.export.student import own_transformer
from tristill.stages.models.language_model import LanguageModel


def refuse(model: LanguageModel, tokenizer_json: Path, export_format: ExportFormat) -> None:
    """Raises ExportError, with all reasons, for a student that the format cannot hold."""
    if reasons := list(_reasons(model, tokenizer_json, export_format, is_trained=True)):
        raise ExportError("; ".join(reasons))


def early_refusals(model: LanguageModel, tokenizer_json: Path) -> str | None:
    """One line on the formats that will refuse the student once it is trained, and why; None if there are none.

    Scales, which training changes, are not looked at.
    """
    formats: dict[str, list[str]] = {}
    for export_format in get_args(ExportFormat):
        if reasons := list(_reasons(model, tokenizer_json, export_format, is_trained=False)):
            reason = "; ".join(reasons).replace(str(tokenizer_json), tokenizer_json.name)
            formats.setdefault(reason, []).append(export_format)
    told = [
        f"`tristill export --format {' or '.join(names)}` will refuse it: {reason}" for reason, names in formats.items()
    ]
    return ". ".join(told) or None


def _reasons(
    model: LanguageModel, tokenizer_json: Path, export_format: ExportFormat, *, is_trained: bool
) -> Iterator[str]:
    """What the checks of a format say against it."""
    if export_format == "hf":
        return
    try:
        own = own_transformer(model)
        if export_format == "bitnet":
            refuse_bitnet(own)
        else:
            refuse_gguf(own, is_trained=is_trained)
    except StageError as exc:
        yield str(exc)
    if export_format == "gguf":
        try:
            refuse_gguf_tokenizer(tokenizer_json, model.vocab_size)
        except StageError as exc:
            yield str(exc)
