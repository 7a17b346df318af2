"""torch.compile for our transformer."""

import os
import shutil

from stages.errors import StageError
from stages.models.transformer import Transformer


def compile_blocks(model: Transformer) -> None:
    """Compile all of a model but its head, in place; names of parameters and what `save_model` writes stay the same.

    The first step of every shape and mode takes a minute or more. Results differ in the last bits. Raises StageError
    where there is no C++ compiler, which torch needs on a CPU.
    """
    compiler = os.environ.get("CXX", "g++")
    if model.head_weight.device.type == "cpu" and shutil.which(compiler) is None:
        raise StageError(
            f"training.compile: found no C++ compiler ({compiler}), which torch.compile needs on a CPU; install one, "
            "name it in CXX, or set training.compile to false"
        )
    model.model.compile()
