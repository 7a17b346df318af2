"""Names of what can be exported; loads nothing."""

from typing import Literal

ExportFormat = Literal["hf", "bitnet", "gguf"]
TernaryType = Literal["TQ2_0", "TQ1_0"]
"""Ternary block types of llama.cpp: 2.06 and 1.69 bits per weight, the same values. TQ2_0 is the faster one."""

_BY_CHOICE: dict[str, tuple[TernaryType, ...]] = {
    "tq2_0": ("TQ2_0",),
    "tq1_0": ("TQ1_0",),
    "both": ("TQ2_0", "TQ1_0"),
}
BLOCK_COLUMNS = 256
"""Weights of a row that share a scale in a ternary block of llama.cpp."""


def ternary_types(choice: str) -> tuple[TernaryType, ...]:
    """The types that a choice on the command line stands for."""
    return _BY_CHOICE[choice]
