"""Where a student starts: random weights, those of its teacher, or those of a given model."""

from pathlib import Path

from torch import Tensor

from tristill.stages.data.tokenizer_gate import require_same_tokenizer
from tristill.stages.distill.config import StudentConfig
from tristill.stages.errors import CheckpointError
from tristill.stages.models.checkpoint import load_model, load_weights, read_tensors, saved_tensors
from tristill.stages.models.description import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    is_ours,
    read_config,
    read_description,
)
from tristill.stages.models.hugging_face import HuggingFaceModel
from tristill.stages.models.language_model import LanguageModel, require_positions, warn_of_positions
from tristill.stages.models.origin import fetch_model, load_origin
from tristill.stages.models.transformer import Transformer, fit_to_inputs
from tristill.stages.targets.source import Epoch, Signals, TargetSource


def start(student: LanguageModel, config: StudentConfig, teacher_folder: Path, source: TargetSource) -> None:
    """Give a student with random weights its first ones, as config.init says.

    `teacher_folder` is opened only for `init = "teacher"`. Raises TokenizerError for a given model of other ids.
    """
    require_positions(student, source.context_length)
    if isinstance(student, HuggingFaceModel):
        student.require_gradients()
    if config.init == "teacher":
        start_from(student, teacher_folder, source, config.init)
    elif config.init == "given":
        assert config.path is not None, "the config wants one for this"
        folder = fetch_model(config.path, config.revision)
        advice = "give student.path a model of the cache's tokenizer, or dump a cache with the tokenizer of this one"
        require_same_tokenizer(folder / TOKENIZER_NAME, source.tokenizer_path, "student.path", advice)
        warn_of_positions(read_config(folder / CONFIG_NAME), source.context_length, "the model at student.path")
        start_from(student, folder, source, config.init)
    elif isinstance(student, Transformer) and student.config.subln:
        _fit_subln(student, source)


def start_from(student: LanguageModel, folder: Path, source: TargetSource, init: str = "teacher") -> None:
    """Give a student the weights in a folder: learned steps where they mean the same, and SubLN where there is none."""
    own = (".log_step", "_sub_norm.weight")
    extra = {name: tensor for name, tensor in saved_tensors(student).items() if name.endswith(own)}
    theirs = read_description(folder).quantize
    has_its_steps = theirs is not None and student.quantize is not None and theirs.has_steps_of(student.quantize)
    tensors = _tensors_for(student, folder)
    if not has_its_steps:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".log_step")}
    try:
        load_weights(student, {**extra, **tensors}, folder / WEIGHTS_NAME)
    except CheckpointError as exc:
        raise CheckpointError(
            f"{exc}; student.init = {init!r} needs that model's folder and a student of its shape: leave student.model "
            "out, or set student.init to 'random'"
        ) from exc
    if not has_its_steps:
        student.fit_steps()  # they follow from the weights
    has_subln = any(name.endswith("_sub_norm.weight") for name in tensors)
    if isinstance(student, Transformer) and student.config.subln and not has_subln:
        _fit_subln(student, source)


def _tensors_for(student: LanguageModel, folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, float32; rows of padding are cut off for our own transformer.

    A student of transformers keeps them: it goes back to where they are expected.
    """
    if load_origin(folder) is None and is_ours(read_config(folder / CONFIG_NAME)):
        return read_tensors(folder / WEIGHTS_NAME)
    tensors = {name: tensor.float() for name, tensor in saved_tensors(load_model(folder)).items()}
    if not isinstance(student, Transformer):
        return tensors
    rows = ("model.embed_tokens.weight", "lm_head.weight")
    return {name: tensor[: student.vocab_size] if name in rows else tensor for name, tensor in tensors.items()}


def _fit_subln(student: Transformer, source: TargetSource) -> None:
    """Let SubLN begin where it changes least: in full precision, on one window."""
    batch = next(source.batches("train", 1, Signals(), Epoch()))
    student.quantize_by(0)
    fit_to_inputs(student, lambda: student(batch.input_ids_BT))
    student.quantize_by(1)
