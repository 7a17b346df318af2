"""Names of what can be exported; loads nothing."""

from typing import Literal

ExportFormat = Literal["hf", "bitnet", "gguf"]
TernaryType = Literal["TQ2_0", "TQ1_0"]
"""Ternary block types of llama.cpp: 2.06 and 1.69 bits per weight, the same values. TQ2_0 is the faster one."""

BLOCK_COLUMNS = 256
"""Weights of a row that share a scale in a ternary block of llama.cpp."""
