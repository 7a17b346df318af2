"""Takes a finished model as the teacher: any checkpoint will do, a quantised student or a model of transformers too."""

import os
import shutil
from pathlib import Path

from tristill.cache.atomic import atomic_file
from tristill.cache.regular_file import open_regular
from tristill.stages.data.tokenized import TokenizedCorpus, corpus_of_model, load_corpus
from tristill.stages.data.tokenizer import beginning_token, load_tokenizer
from tristill.stages.data.tokenizer_gate import own_tokenizer, require_same_tokenizer
from tristill.stages.errors import CheckpointError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.evaluate.evaluate import basis, evaluate, evaluate_test
from tristill.stages.models.checkpoint import load_model, pick_device
from tristill.stages.models.companions import write_tokenizer
from tristill.stages.models.description import CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_NAME, is_ours, read_config
from tristill.stages.models.hugging_face_folder import load_hugging_face
from tristill.stages.models.language_model import LanguageModel, warn_of_positions
from tristill.stages.models.origin import Origin, fetch_model, load_origin, model_fingerprint
from tristill.stages.models.trust import trust_code_of
from tristill.stages.progress import say
from tristill.stages.targets.online import OnlineSource
from tristill.stages.teacher.config import TeacherConfig
from tristill.stages.teacher.summary import TeacherSummary


def take_teacher(
    config: TeacherConfig, data_folder: Path, folder: Path, device_name: str | None, evaluation: EvaluateConfig
) -> TeacherSummary:
    """Make `folder` the run's folder of the given model, and evaluate it; it has to load and to fit the corpus.

    One of ours is copied, byte for byte; one of transformers stays where it is, and the folder says where.
    """
    assert config.path is not None, "a teacher that is not given is trained"
    device = pick_device(device_name)
    corpus = load_corpus(data_folder)
    given = fetch_model(config.path, config.revision)
    used_there = load_origin(given)
    given = given if used_there is None else used_there.folder  # of another run, which uses it in place
    if config.trust_remote_code:
        trust_code_of(given)
    require_same_tokenizer(
        given / TOKENIZER_NAME,
        data_folder / TOKENIZER_NAME,
        "the teacher",
        f"set data.tokenizer to {own_tokenizer(given, given)} and run `tristill tokenize --force`",
    )
    before = beginning_token(given, load_tokenizer(given / TOKENIZER_NAME))
    if before is not None and corpus.bos_id is None:
        say(
            f"warning: {given}: its tokenizer puts {before} before a text, and windows here begin without, which may "
            "cost the teacher much of what it knows; data.tokenizer.bos_token says how windows begin"
        )
    take = _take_ours if is_ours(read_config(given / CONFIG_NAME)) else _use_in_place
    warn_of_positions(read_config(given / CONFIG_NAME), corpus.context_length, "the teacher")
    model = take(config, given, corpus, data_folder, folder).to(device)
    if corpus_of_model(data_folder, model.vocab_size, str(given)) != corpus:
        say(f"teacher: knows {model.vocab_size:,} of the {corpus.vocab_size:,} ids of its tokenizer; no other occurs")
    fingerprint = model_fingerprint(folder)
    source = OnlineSource(data_folder, device)
    summary = TeacherSummary(
        validation=evaluate(model, source, evaluation, "teacher"),
        test=evaluate_test(model, source, evaluation, "teacher"),
        train=None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        fingerprint=fingerprint,
        basis=basis(fingerprint, source, evaluation),
    )
    summary.save(folder)
    say(f"teacher: {summary.parameters:,} parameters, {summary.validation.text}")
    return summary


def _take_ours(
    config: TeacherConfig, given: Path, corpus: TokenizedCorpus, data_folder: Path, folder: Path
) -> LanguageModel:
    if odd := config.of_transformers:
        raise CheckpointError(
            f"teacher.{odd[0]}: is for models of transformers, and {given} is one of ours, which is forwarded in "
            "float32, or as cache.precision says; leave it out"
        )
    model = load_model(given)
    if model.vocab_size > corpus.vocab_size:
        raise CheckpointError(
            f"{given}: found {model.vocab_size} output entries, expected {corpus.vocab_size}, one for each id of "
            f"{data_folder / TOKENIZER_NAME}; give a teacher whose vocabulary is not padded"
        )
    _copy(given / CONFIG_NAME, folder / CONFIG_NAME)
    _copy(given / WEIGHTS_NAME, folder / WEIGHTS_NAME)
    write_tokenizer(data_folder / TOKENIZER_NAME, folder, given)
    return model


def _use_in_place(
    config: TeacherConfig, given: Path, corpus: TokenizedCorpus, data_folder: Path, folder: Path
) -> LanguageModel:
    origin = Origin(
        folder=given.absolute(),
        dtype=config.dtype,
        attention=config.attention,
        named=config.named,
    )
    model = load_hugging_face(origin, data_folder / TOKENIZER_NAME)
    say(f"teacher: {model.shape.kind} of transformers, {model.depth} blocks, in {config.dtype}, used in place: {given}")
    if (num_padding := model.num_outputs - corpus.vocab_size) > 0:
        say(
            f"teacher: {model.num_outputs:,} outputs for {corpus.vocab_size:,} ids: the last {num_padding:,} are "
            "padding of the output matrix, and never receive mass"
        )
    _copy(given / CONFIG_NAME, folder / CONFIG_NAME)
    write_tokenizer(data_folder / TOKENIZER_NAME, folder, given)
    origin.with_fingerprint().save(folder)
    return model


def _copy(original: Path, to: Path) -> None:
    with os.fdopen(open_regular(original, follows_links=True), "rb") as source, atomic_file(to) as copy:
        shutil.copyfileobj(source, copy)
