"""Models of transformers from folders: found, loaded with nothing from the network or of the folder's own code."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors
import torch

from tristill.cache.regular_file import require_regular, require_regular_files
from tristill.stages.errors import CheckpointError, StageError
from tristill.stages.models.description import CONFIG_NAME, WEIGHTS_NAME, HuggingFaceShape, read_config
from tristill.stages.models.hugging_face import HuggingFaceModel
from tristill.stages.models.origin import Origin, model_files
from tristill.stages.models.trust import is_trusted
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.tokenizer_file import load_tokenizer

_COUNTS = ("layer", "depth", "block", "expert")
"""Words in the names of numbers of parts, of which each has tensors."""
_FEWEST_PARTS = 2048
_SMALL_BUFFERS = 2**28
"""Numbers that are not among the weights, such as angles of positions, in models of any size."""


def require_room(folder: Path, parameters: int, *, per_byte: int = 1) -> None:
    """Refuses a description of more parameters than the files of weights have room for. per_byte: packed ones."""
    num_bytes = sum(_regular(path).stat().st_size for path in _weights(folder))
    if parameters > num_bytes * per_byte:
        raise CheckpointError(
            f"{folder}: found {num_bytes} bytes of weights, but {folder / CONFIG_NAME} describes {parameters} "
            f"parameters; put the file of weights there that belongs to it ({WEIGHTS_NAME})"
        )


def require_room_for_parts(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses a description of more layers or experts than the files of weights have tensors."""
    most = max(_FEWEST_PARTS, sum(map(_num_tensors, _weights(folder))))
    for key, value in _numbers(config):
        if value > most and any(word in key for word in _COUNTS):
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: found {key} = {value}, expected at most {most}, the number of tensors in its "
                "files of weights, or fewer; put the description there that belongs to them"
            )


def described_parameters(make: Callable[[], torch.nn.Module]) -> int:
    """How many parameters the module has that `make` would make; none of them is."""
    with torch.device("meta"):
        module = make()
    buffers = sum(buffer.numel() for buffer in module.buffers())
    return sum(parameter.numel() for parameter in module.parameters()) + max(0, buffers - _SMALL_BUFFERS)


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _regular(path: Path) -> Path:
    try:
        require_regular(path)
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({exc})") from exc
    return path


def _num_tensors(path: Path) -> int:
    try:
        with safetensors.safe_open(_regular(path), "pt") as file:
            return len(file.keys())
    except (OSError, safetensors.SafetensorError) as exc:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({exc})") from exc


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _numbers(part, str(name))
    elif isinstance(value, int | float):
        yield key, value


_MOST_PER_BYTE = 8
"""Parameters in a byte of a file of weights that is packed."""


def import_transformers(what: str) -> Any:
    """The library, or CheckpointError with how to get it."""
    try:
        import transformers
    except ImportError as exc:
        raise CheckpointError(
            f"{what}: is no model of ours, and transformers, which may know it, is not installed; "
            "run `pip install -e '.[hf]'`"
        ) from exc
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_inner(origin: Origin) -> Any:
    """The causal language model itself, in evaluation mode, on the CPU; refuses a folder that lacks weights of it."""
    transformers = import_transformers(str(origin.folder))
    model_files(origin.folder)  # refuses an index that names files elsewhere
    try:
        require_regular_files(origin.folder)
    except OSError as exc:
        raise CheckpointError(f"{exc.filename}: cannot be read ({exc}); remove it, or give another folder") from exc
    if not is_trusted(origin.folder):
        arguments = {"local_files_only": True, "trust_remote_code": False}
        _require_room(
            origin.folder,
            read_config(origin.folder / CONFIG_NAME),
            lambda: transformers.AutoConfig.from_pretrained(origin.folder, **arguments),
            per_byte=_MOST_PER_BYTE,
        )
    attention = {} if origin.attention is None else {"attn_implementation": origin.attention}
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            origin.folder,
            dtype=getattr(torch, origin.dtype),
            local_files_only=True,
            trust_remote_code=is_trusted(origin.folder),
            use_safetensors=True,
            output_loading_info=True,
            **attention,
        )
    except Exception as exc:  # the library raises many kinds: config, weights, code of its own wanted
        first_line = (str(exc).splitlines() or [""])[0]
        raise CheckpointError(
            f"{origin.folder}: transformers cannot load it as a causal language model "
            f"({type(exc).__name__}: {first_line})"
        ) from exc
    missing = sorted([*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])])
    if missing:
        raise CheckpointError(
            f"{origin.folder}: its weights lack {len(missing)} tensors of a {model.config.model_type}, which would be "
            f"random: {', '.join(missing[:3])}; give a folder of a causal language model with all its weights"
        )
    return model.eval()


def require_room_for(folder: Path, shape: HuggingFaceShape) -> None:
    """Refuses an architecture that the weights in a folder of ours have no room for, before it takes any memory."""
    _require_room(folder, shape.config, lambda: _config_of(shape))


def _require_room(folder: Path, description: dict[str, Any], read: Callable[[], Any], *, per_byte: int = 1) -> None:
    require_room_for_parts(folder, description)
    transformers = import_transformers(str(folder))
    try:
        count = described_parameters(lambda: transformers.AutoModelForCausalLM.from_config(read()))
    except Exception:  # noqa: BLE001 - of many kinds: whoever makes it says what is wrong
        return
    require_room(folder, count, per_byte=per_byte)


def load_hugging_face(origin: Origin, tokenizer_json: Path) -> HuggingFaceModel:
    """The model as the stages use it, for the ids of that tokenizer; no gradients."""
    inner = load_inner(origin)
    shape = hugging_face_shape(origin.folder)
    vocab_size = num_ids(tokenizer_json)  # may be more than there are rows, of ids that no text has
    vocab_size = min(vocab_size, getattr(inner.get_input_embeddings(), "num_embeddings", vocab_size))
    model = _model_of(inner, shape, vocab_size, None, str(origin.folder))
    return model.requires_grad_(requires_grad=False)


def new_hugging_face(
    shape: HuggingFaceShape, vocab_size: int, quantize: QuantizeConfig | None, seed: int
) -> HuggingFaceModel:
    """A model of that architecture with random weights, as transformers draws them; padded if its shape says so.

    Raises CheckpointError if it has fewer outputs than there are ids.
    """
    transformers = import_transformers(f"architecture {shape.kind}")
    if softcap := shape.text.get("final_logit_softcapping"):
        raise CheckpointError(
            f"architecture {shape.kind}: found final_logit_softcapping = {softcap}, and the losses of a student know "
            "no capped logits; give a student of another architecture (a teacher may cap its logits)"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inner = transformers.AutoModelForCausalLM.from_config(_config_of(shape), dtype=torch.float32)
        except Exception as exc:  # as above
            first_line = (str(exc).splitlines() or [""])[0]
            raise CheckpointError(
                f"architecture {shape.kind}: transformers cannot make it ({type(exc).__name__}: {first_line})"
            ) from exc
    return _model_of(inner.eval(), shape, vocab_size, quantize, f"architecture {shape.kind}")


def _model_of(
    inner: Any, shape: HuggingFaceShape, vocab_size: int, quantize: QuantizeConfig | None, where: str
) -> HuggingFaceModel:
    try:
        return HuggingFaceModel(inner, shape, vocab_size, quantize)
    except CheckpointError as exc:
        raise CheckpointError(f"{where}: {exc}") from exc
    except StageError:  # of settings, which it names
        raise
    except Exception as exc:  # a forward pass of any code
        first_line = (str(exc).splitlines() or [""])[0]
        raise CheckpointError(
            f"{where}: its forward pass fails in transformers ({type(exc).__name__}: {first_line})"
        ) from exc


def _config_of(shape: HuggingFaceShape) -> Any:
    """As transformers reads it from a file, which is not how it takes arguments."""
    from transformers import AutoConfig

    with TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_NAME).write_text(shape.config_json)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.name_or_path = ""
    return config


def hugging_face_shape(folder: Path) -> HuggingFaceShape:
    """The architecture in a folder of transformers."""
    try:
        return HuggingFaceShape.of(read_config(folder / CONFIG_NAME))
    except ValueError as exc:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {exc}, expected the description of a model") from exc


def num_ids(tokenizer_json: Path) -> int:
    """One more than the largest id of a tokenizer."""
    vocabulary = load_tokenizer(tokenizer_json).get_vocab(with_added_tokens=True)
    return int(max(vocabulary.values())) + 1


def tensors_of(model: HuggingFaceModel) -> dict[str, torch.Tensor]:
    """Latent weights by the names of transformers, none twice; linear layers as (out, in)."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.inner.state_dict(keep_vars=True).items():
        place = tensor.data_ptr() or id(tensor)  # without an address: empty, or ranks have parts of it
        if place not in seen:
            seen.add(place)
            tensors[name] = tensor.detach().contiguous()
    return tensors


def with_shared(model: HuggingFaceModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `tensors_of` gave, and the same again under the other names of weights that a model of this shape shares."""
    own = model.inner.state_dict()
    known = {own[name].data_ptr(): tensor for name, tensor in tensors.items() if name in own}
    shared = {name: known[to.data_ptr()] for name, to in own.items() if name not in tensors and to.data_ptr() in known}
    return {**tensors, **shared}
