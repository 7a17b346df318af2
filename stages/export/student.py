"""A trained student as it is exported, and its twins that compute as other runtimes do."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from tristill.stages.errors import CheckpointError, ExportError
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.companions import SpecialIds
from tristill.stages.models.description import CONFIG_NAME, TOKENIZER_NAME, ModelConfig, read_config
from tristill.stages.models.hugging_face import HuggingFaceModel
from tristill.stages.models.language_model import LanguageModel
from tristill.stages.models.origin import model_fingerprint
from tristill.stages.models.transformer import Transformer


@dataclass(frozen=True)
class Student:
    """A model folder of ours in memory, in evaluation mode."""

    folder: Path
    loaded: LanguageModel
    context_length: int
    end_of_text_id: int
    fingerprint: str

    @property
    def model(self) -> Transformer:
        """Our own transformer. Raises ExportError for another architecture, which goes out as itself alone."""
        return own_transformer(self.loaded)

    @property
    def special(self) -> dict[str, int]:
        """Ids of special tokens, by their keys in a description of transformers."""
        return SpecialIds.of(self.folder).described(self.end_of_text_id)

    @property
    def tokenizer_json(self) -> Path:
        """Its tokenizer."""
        return self.folder / TOKENIZER_NAME


def own_transformer(model: LanguageModel) -> Transformer:
    """The model, if it is our own transformer. Raises ExportError for another architecture."""
    if isinstance(model, HuggingFaceModel):
        raise ExportError(
            f"found an architecture of transformers ({model.shape.kind}), which goes out in its own format only, with "
            "its weights dequantised: use `--format hf`; what is packed, or read by llama.cpp, is our own transformer, "
            "a Llama"
        )
    assert isinstance(model, Transformer), "there are no other models"
    return model


def load_student(folder: Path) -> Student:
    """The model in a folder that `save_model` wrote."""
    config = read_config(folder / CONFIG_NAME)
    model = load_model(folder).eval()
    try:
        context_length, end_of_text_id = int(config["max_position_embeddings"]), int(config["eos_token_id"])
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"{folder / CONFIG_NAME}: does not describe a model of ours ({exc})") from exc
    return Student(folder, model, context_length, end_of_text_id, model_fingerprint(folder))


def float_activations(model: LanguageModel) -> LanguageModel:
    """The same weights, latent and quantised, with no rounding of activations."""
    return _with_activations(model, "none")


def int8_activations(model: LanguageModel) -> LanguageModel:
    """The same weights, with 8 bits per position before every quantised layer, whatever it was trained with."""
    return _with_activations(model, "absmax-int8")


def _with_activations(model: LanguageModel, activations: Literal["absmax-int8", "none"]) -> LanguageModel:
    if model.quantize is None or model.quantize.activations == activations:
        return model
    twin = copy.deepcopy(model)
    twin.quantize = model.quantize.model_copy(update={"activations": activations})
    for layer in twin.quantized_linears().values():
        layer.quantize = twin.quantize
    return twin.eval()


def plain_transformer(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Transformer:
    """A model in full precision with these weights; its head is the embedding if `tensors` has none."""
    shape = config.model_copy(update={"tied_embeddings": "lm_head.weight" not in tensors})
    with torch.device("meta"):
        model = Transformer(shape, len(tensors["model.embed_tokens.weight"]))
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]} if shape.tied_embeddings else {}
    model.load_state_dict({**tensors, **head}, assign=True)
    return model.eval()


def plain_linears(model: Transformer) -> dict[str, nn.Linear]:
    """The linear layers that are not quantised, by name; the head only if it is not the embedding matrix."""
    quantized = model.quantized_linears()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name not in quantized
        and not (name == "lm_head" and model.config.tied_embeddings)
    }


def require_ternary(model: Transformer, what: str) -> None:
    """Raises ExportError unless some of its linear layers are ternary."""
    if model.quantize is None or not model.quantize.is_ternary:
        found = "no quantised weights" if model.quantize is None else f"weights of the code {model.quantize.weights!r}"
        raise ExportError(
            f"found {found}, but {what} holds ternary weights: -1, 0 or 1 times a scale; use `--format hf`, which "
            "holds any weights"
        )
