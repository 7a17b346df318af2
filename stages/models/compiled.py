"""torch.compile for our transformer."""

import os
import shutil

from tristill.stages.errors import StageError
from tristill.stages.models.language_model import LanguageModel
from tristill.stages.models.transformer import Transformer


def compile_model(model: LanguageModel) -> None:
    """Compile a model in place: see Transformer.compile_blocks. The first step takes a minute or more.

    Raises StageError where there is no C++ compiler, which torch needs on a CPU, and for other architectures.
    """
    if not isinstance(model, Transformer):
        raise StageError("training.compile: is for our own transformer, a Llama; set it to false")
    compiler = os.environ.get("CXX", "g++")
    if model.head_weight.device.type == "cpu" and shutil.which(compiler) is None:
        raise StageError(
            f"training.compile: found no C++ compiler ({compiler}), which torch.compile needs on a CPU; install one, "
            "name it in CXX, or set training.compile to false"
        )
    model.compile_blocks()
