"""Takes a finished model as the teacher: any checkpoint will do, a quantised student too."""

import shutil
from pathlib import Path

from cache.atomic import atomic_file
from cache.hashing import sha256_of_file
from stages.data.tokenized import load_corpus
from stages.errors import CheckpointError
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluate import evaluate
from stages.models.folder import CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_NAME, load_model, model_fingerprint, pick_device
from stages.targets.online import OnlineSource
from stages.teacher.summary import TeacherSummary


def take_teacher(
    given: Path, data_folder: Path, folder: Path, device_name: str | None, evaluation: EvaluateConfig
) -> TeacherSummary:
    """Copy the model into `folder`, byte for byte, and evaluate it, once it is known to load and to fit the corpus."""
    device = pick_device(device_name)
    corpus = load_corpus(data_folder)
    model = load_model(given).to(device)
    _check_tokenizer(given, data_folder, corpus.tokenizer_sha256)
    if model.vocab_size != corpus.vocab_size:
        raise CheckpointError(
            f"{given}: found {model.vocab_size} output entries, expected {corpus.vocab_size}, one for each id of "
            f"{data_folder / TOKENIZER_NAME}; give a teacher whose vocabulary is not padded"
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME):
        with (given / name).open("rb") as original, atomic_file(folder / name) as copy:
            shutil.copyfileobj(original, copy)
    source = OnlineSource(data_folder, device)
    summary = TeacherSummary(
        validation=evaluate(model, source, evaluation, "teacher"),
        train=None,
        parameters=model.config.parameters(model.vocab_size),
        fingerprint=model_fingerprint(folder),
    )
    summary.save(folder)
    return summary


def _check_tokenizer(given: Path, data_folder: Path, expected: str) -> None:
    path = given / TOKENIZER_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; the ids that a teacher knows are those of its own tokenizer")
    if (found := sha256_of_file(path)) != expected:
        raise CheckpointError(
            f"{path}: found a tokenizer with SHA-256 {found}, expected {expected}, that of {data_folder}; set "
            f"data.tokenizer to {{ kind = 'file', path = '{path}' }} and run `tristill tokenize --force`"
        )
