"""A model's folder: `config.json`, `model.safetensors`, `tokenizer.json`; a teacher's is a Hugging Face Llama."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tristill.cache.atomic import write_atomically
from tristill.cache.regular_file import require_regular
from tristill.stages.errors import CheckpointError, StageError
from tristill.stages.models.companions import SpecialIds, generation_config, write_tokenizer
from tristill.stages.models.description import (
    CONFIG_NAME,
    START_KEY,
    STUDENT_TYPE,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    HuggingFaceShape,
    Shape,
    is_ours,
    read_config,
    read_description,
)
from tristill.stages.models.hugging_face import HuggingFaceModel
from tristill.stages.models.hugging_face_folder import (
    load_hugging_face,
    new_hugging_face,
    require_room,
    require_room_for,
    tensors_of,
    with_shared,
)
from tristill.stages.models.language_model import LanguageModel
from tristill.stages.models.origin import Origin, checked_origin
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.ranks import ALONE, Ranks, current_ranks


def save_model(
    folder: Path,
    model: LanguageModel,
    tokenizer_json: Path,
    context_length: int,
    end_of_text_id: int,
    ranks: Ranks = ALONE,
    bos_id: int | None = None,
) -> None:
    """Write the folder. Our own transformer in full precision loads in transformers as `LlamaForCausalLM`.

    A quantised model is saved with its latent full-precision weights, and its learned steps, under a model type of our
    own, so that no other program takes those for the weights to run; so is a model of another architecture. All ranks
    must call it: each may have parts of the tensors; the first writes, and all return when it is done. bos_id: the
    token that began its windows, if one did.
    """
    tensors = _whole_tensors(model, ranks)
    if ranks.is_first:
        _write_model(folder, model, tensors, tokenizer_json, context_length, end_of_text_id, bos_id)
    ranks.wait_for_all()


def _whole_tensors(model: LanguageModel, ranks: Ranks) -> dict[str, Tensor]:
    """All that is saved, on the first rank; one tensor at a time is whole on the others."""
    if not ranks.are_many:
        return saved_tensors(model)
    from torch.distributed.tensor import DTensor  # takes half a second, which other commands do not have

    found = {}
    for name, tensor in saved_tensors(model).items():
        whole = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if ranks.is_first:
            found[name] = whole
    return found


def _write_model(
    folder: Path,
    model: LanguageModel,
    tensors: dict[str, Tensor],
    tokenizer_json: Path,
    context_length: int,
    end_of_text_id: int,
    bos_id: int | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer_json, folder)
    if not (folder / "tokenizer_config.json").is_file():
        tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length}
        _write_json(folder / "tokenizer_config.json", tokenizer_config)
    if how := generation_config(folder, end_of_text_id):
        write_atomically(folder / "generation_config.json", how)
    special = SpecialIds.of(folder).described(end_of_text_id) | {"eos_token_id": end_of_text_id}
    start = {} if bos_id is None else {START_KEY: bos_id}
    _write_json(folder / CONFIG_NAME, _description(model, context_length, special) | start)
    write_atomically(folder / WEIGHTS_NAME, safetensors.torch.save(tensors, metadata={"format": "pt"}))


def load_model(folder: Path) -> LanguageModel:
    """The model in a folder, on the CPU: one that `save_model` wrote, in float32, or one of transformers.

    A run's folder of a teacher that is used in place says where that is (see origin.py).
    """
    origin = checked_origin(folder)
    if origin is None and is_ours(read_config(folder / CONFIG_NAME)):
        description = read_description(folder)
        model: LanguageModel
        if isinstance(description.shape, HuggingFaceShape):
            require_room_for(folder, description.shape)
            model = new_hugging_face(description.shape, description.vocab_size, description.quantize, seed=0)
        else:
            require_room(folder, description.shape.parameters(description.vocab_size))
            model = Transformer(description.shape, description.vocab_size, description.quantize)
        load_weights(model, read_tensors(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
        return model
    return load_hugging_face(origin or Origin(folder=folder), folder / TOKENIZER_NAME)


def load_transformer(folder: Path) -> Transformer:
    """As load_model, for what is done with our own transformer only."""
    model = load_model(folder)
    if not isinstance(model, Transformer):
        raise CheckpointError(f"{folder}: found an architecture of transformers, expected our own transformer, a Llama")
    return model


def new_model(shape: Shape, vocab_size: int, quantize: QuantizeConfig | None, seed: int) -> LanguageModel:
    """A model with random weights of that seed; one of transformers may have more outputs than there are ids."""
    if isinstance(shape, HuggingFaceShape):
        return new_hugging_face(shape, vocab_size, quantize, seed)
    model = Transformer(shape, vocab_size, quantize)
    model.initialize(torch.Generator().manual_seed(seed))
    return model


def saved_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Every weight once, by name; those that are shared under the first of their names."""
    if isinstance(model, HuggingFaceModel):
        return tensors_of(model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if isinstance(model, Transformer) and model.config.tied_embeddings:
        tensors.pop("lm_head.weight", None)  # there is none in a model whose head is packed
    return tensors


def load_weights(model: LanguageModel, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy tensors into a model; refuses missing, unknown and wrongly shaped ones by name."""
    if isinstance(model, HuggingFaceModel):
        tensors = with_shared(model, tensors)
    if isinstance(model, Transformer) and model.config.tied_embeddings and "model.embed_tokens.weight" in tensors:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    target = model.inner if isinstance(model, HuggingFaceModel) else model
    expected = {name: tuple(tensor.shape) for name, tensor in target.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        detail = "; ".join(f"{name}: found {found.get(name)}, expected {expected.get(name)}" for name in odd[:3])
        raise CheckpointError(f"{where}: {len(odd)} tensors do not fit the model: {detail}")
    target.load_state_dict(tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        require_regular(path)  # the library says of every file that cannot be opened that it is not there
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as exc:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({exc})") from exc


def pick_device(name: str | None) -> torch.device:
    """The named device; CUDA if there is one, else the CPU, when none is named.

    Of many ranks on a machine each takes a CUDA device of its own.
    """
    ranks = current_ranks()
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if ranks.are_many and device.type == "cuda":
            if device.index is not None:
                raise StageError(f"device {name!r}: is one, and there are {ranks.world_size} ranks; set it to cuda")
            device = torch.device("cuda", ranks.local_rank)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:  # torch says it either way
        others = "cpu or cuda" if torch.cuda.is_available() else "cpu: this machine has no CUDA that torch can use"
        raise StageError(f"device {name!r}: cannot be used here ({str(exc).splitlines()[0]}); set {others}") from exc
    return device


def hugging_face_config(model: Transformer, context_length: int, special: Mapping[str, int]) -> dict[str, Any]:
    """The content of `config.json` for a model of this shape and code. special: ids of tokens, by its keys."""
    config = model.config
    description: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        **special,
        "torch_dtype": "float32",
    }
    if model.quantize is not None:
        description |= {
            "architectures": ["TristillTernaryForCausalLM"],
            "model_type": STUDENT_TYPE,
            "quantize": model.quantize.model_dump(exclude_none=True),
        }
    if config.subln:
        description["subln"] = True
    return description


def _description(model: LanguageModel, context_length: int, special: Mapping[str, int]) -> dict[str, Any]:
    if isinstance(model, Transformer):
        return hugging_face_config(model, context_length, special)
    assert isinstance(model, HuggingFaceModel), "there are no other models"
    quantize = {} if model.quantize is None else {"quantize": model.quantize.model_dump(exclude_none=True)}
    return {
        "architectures": ["TristillTernaryForCausalLM"],
        "model_type": STUDENT_TYPE,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": context_length,
        **special,
        **quantize,
        "hugging_face": model.shape.config,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode("utf-8"))
