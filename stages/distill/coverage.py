"""Share of a student's weights that is quantised, and what is left in full precision."""

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from tristill.stages.models.language_model import LanguageModel

_LITTLE = 0.9
_NAMES = 3


@dataclass(frozen=True)
class Coverage:
    """Weights of the blocks: matrices of all kinds, but for embeddings and the output head.

    left: number of weights that are not quantised, by the name of their parameter, block numbers as `*`.
    """

    code: str
    quantized: int
    left: Counter[str]

    @property
    def share(self) -> float:
        """Share of the weights that is quantised; 1 where there are none."""
        total = self.quantized + self.left.total()
        return self.quantized / total if total else 1.0

    def lines(self, label: str) -> list[str]:
        """To be said when a training begins: the share, and a warning with what is left out if that is much."""
        names = [f"{name} ({number:,})" for name, number in self.left.most_common(_NAMES)]
        names += [f"{len(self.left) - _NAMES} more"] * (len(self.left) > _NAMES)
        said = f"{self.share:.1%} of the weights of its blocks are {self.code}"
        if not names:
            return [f"{label}: {said}"]
        if self.share >= _LITTLE:
            return [f"{label}: {said}; in full precision stay {', '.join(names)}"]
        return [f"warning: only {said}; in full precision stay {', '.join(names)}, see student.quantize.layers"]


def coverage(student: LanguageModel) -> Coverage:
    """What is quantised of a student."""
    layers = student.quantized_linears()
    quantized = {id(layer.latent) for layer in layers.values()}
    embeddings = [module for module in student.modules() if isinstance(module, nn.Embedding)]
    outside = {id(parameter) for module in embeddings for parameter in module.parameters()}
    outside |= {id(parameter) for parameter in student.head_parameters()}
    if student.blocks:  # a model that also sees has others, which text does not pass
        inside = {id(parameter) for block in student.blocks for parameter in block.parameters()}
        outside |= {id(parameter) for parameter in student.parameters()} - inside
    found = Coverage(_code(student), 0, Counter())
    num_quantized = 0
    for name, parameter in student.named_parameters():
        if parameter.ndim < 2 or id(parameter) in outside or name.endswith(".log_step"):
            continue
        if id(parameter) in quantized:
            num_quantized += parameter.numel()
        else:
            found.left[re.sub(r"\b\d+\b", "*", name.removeprefix("inner."))] += parameter.numel()
    return Coverage(found.code, num_quantized, found.left)


def _code(student: LanguageModel) -> str:
    if student.quantize is None or student.quantize.packed_bits is None:
        return "quantised"
    return "ternary" if student.quantize.is_ternary else f"of {student.quantize.packed_bits} bits"
