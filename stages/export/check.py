"""Whether what was written is the student: its weights bit for bit, its tokenizer, and what it computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tristill.stages.data.tokenizer import load_tokenizer
from tristill.stages.errors import ExportError
from tristill.stages.export.folder_reader import read_folder
from tristill.stages.export.gguf_reader import check_gguf, read_gguf
from tristill.stages.export.llama_cpp_runtime import llama_cpp_runtime
from tristill.stages.export.own_format import compare_own_format
from tristill.stages.export.packages import find_transformers, find_xllamacpp
from tristill.stages.export.parity import (
    FLOAT_BOUNDS,
    INT8_BOUNDS,
    TRAINED_BOUNDS,
    Bounds,
    HeldOut,
    Parity,
    Runtime,
    measure_parity,
)
from tristill.stages.export.rounding import (
    as_trained,
    in_blocks,
    rounded_in_blocks,
    rounded_per_position,
    without_rounding,
)
from tristill.stages.export.student import Student
from tristill.stages.export.tokenizer_parity import tokenizer_parity
from tristill.stages.export.transformers_runtime import TransformersRuntime
from tristill.stages.models.hugging_face import HuggingFaceModel

NUM_WINDOWS = 16
_POSITIONS_PER_WINDOW = 256
_LLAMA_CPP_ENTRIES = 2**19
"""llama.cpp gives a position's log-probabilities as JSON, at 8 microseconds each: so many of them take some seconds."""
_LLAMA_CPP_POSITIONS = (128, 256)
"""At least, for on fewer a tie or two would pass for a wrong export, whatever it takes: half a minute with a vocabulary
of 32,000, over two minutes with one of 128,000. And at most."""
_LLAMA_CPP_WINDOWS = 4
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Verdict:
    """How far an export is from its student, and who computed it."""

    runtime: str
    tokenizer_texts: int | None
    """Texts whose ids the runtime's tokenizer made too; None where files were only read back."""
    reference: str
    to_reference: Parity
    """From the student's weights in our transformer, activations rounded as the runtime does: has to be close."""
    to_trained: Parity
    """From the student as it was trained: what the runtime's way of rounding activations makes."""
    bounds: Bounds
    """Of to_reference."""
    trained_bounds: Bounds = TRAINED_BOUNDS
    """Of to_trained."""

    @property
    def is_well_computed(self) -> bool:
        """Whether the runtime computes what is in the files, whether or not that is still the trained student."""
        return not self.bounds.broken_by(self.to_reference)

    @property
    def broken(self) -> list[str]:
        """Bounds that do not hold, each with what was compared."""
        compared = (
            (f"its own weights ({self.reference})", self.bounds.broken_by(self.to_reference)),
            ("the student as trained", self.trained_bounds.broken_by(self.to_trained)),
        )
        return [f"against {what}: {problem}" for what, problems in compared for problem in problems]


def check_folder(student: Student, kind: Literal["hf", "bitnet"], folder: Path, text: HeldOut) -> Verdict:
    """The verdict on a folder; raises ExportError if weights or tokenizer are others."""
    compare_weights(student, folder)
    return judge_folder(student, kind, folder, text)


def check_file(student: Student, path: Path, text: HeldOut) -> Verdict:
    """The verdict on a GGUF file; raises ExportError if weights, metadata or tokenizer are others."""
    check_gguf(
        path,
        student.model,
        student.tokenizer_json,
        context_length=student.context_length,
        end_of_text_id=student.end_of_text_id,
    )
    return judge_file(student, path, text)


def compare_weights(student: Student, folder: Path) -> None:
    """Raises ExportError unless the folder holds the student's trits and values, and scales to float32's rounding."""
    if isinstance(student.loaded, HuggingFaceModel):
        compare_own_format(student.loaded, folder)
        return
    found = dict(read_folder(folder).model.named_parameters())
    layers = student.model.quantized_linears()
    for name, parameter in found.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            is_same = torch.equal(parameter, student.model.get_parameter(name).float())
        else:
            values = layer.quantized_weight().float()
            is_same = torch.equal(parameter.sign(), values.sign()) and torch.allclose(parameter, values, _ROUNDING, 0)
        if not is_same:
            raise ExportError(f"{folder}: {name}: found other values than the student's")


def judge_folder(student: Student, kind: Literal["hf", "bitnet"], folder: Path, text: HeldOut) -> Verdict:
    """The verdict of transformers on a folder, or ours on its files where transformers is not installed."""
    model, packed = student.loaded, kind == "bitnet"
    transformers = find_transformers(packed=packed)
    references = [rounded_per_position(model) if packed else without_rounding(model), as_trained(model)]
    bounds = INT8_BOUNDS if packed else FLOAT_BOUNDS
    if transformers is None:
        back = read_folder(folder)
        return _verdict(back, references, text, _POSITIONS_PER_WINDOW, bounds, None)
    theirs = TransformersRuntime(transformers, folder, model.vocab_size)
    tokenizer = load_tokenizer(student.tokenizer_json)
    num_texts = tokenizer_parity(tokenizer, theirs.tokenize, text.ids, theirs.name)
    return _verdict(theirs, references, text, _POSITIONS_PER_WINDOW, bounds, num_texts)


def judge_file(student: Student, path: Path, text: HeldOut) -> Verdict:
    """The verdict of llama.cpp on a GGUF file, or ours on its tensors where xllamacpp is not installed."""
    model = student.model
    references = [rounded_in_blocks(model), as_trained(model)]
    if find_xllamacpp() is None:
        file = read_gguf(path)
        back = in_blocks("the file, read back", file.model(), file.ternary)
        return _verdict(back, references, text, _POSITIONS_PER_WINDOW, INT8_BOUNDS, None)
    few = HeldOut(text.ids[:_LLAMA_CPP_WINDOWS], text.labels[:_LLAMA_CPP_WINDOWS])
    per_window = llama_cpp_positions(model.vocab_size) // len(few.ids)
    with llama_cpp_runtime(path, student.context_length, model.vocab_size) as theirs:
        tokenizer = load_tokenizer(student.tokenizer_json)
        num_texts = tokenizer_parity(tokenizer, theirs.tokenize, text.ids, theirs.name)
        return _verdict(theirs, references, few, per_window, INT8_BOUNDS, num_texts)


def llama_cpp_positions(vocab_size: int) -> int:
    """At how many positions llama.cpp is asked."""
    fewest, most = _LLAMA_CPP_POSITIONS
    return min(max(_LLAMA_CPP_ENTRIES // vocab_size, fewest), most)


def _verdict(
    exported: Runtime,
    references: Sequence[Runtime],
    text: HeldOut,
    per_window: int,
    bounds: Bounds,
    num_texts: int | None,
) -> Verdict:
    to_reference, to_trained = measure_parity(exported, references, text, per_window)
    return Verdict(exported.name, num_texts, references[0].name, to_reference, to_trained, bounds)
