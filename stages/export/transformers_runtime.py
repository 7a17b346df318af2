"""An exported folder in transformers itself."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tristill.stages.errors import ExportError


class TransformersRuntime:
    """A runtime (see parity) that is the model and the tokenizer which transformers makes of a folder."""

    def __init__(self, transformers: Any, folder: Path, vocab_size: int) -> None:
        """`transformers`: the package. vocab_size: ids there are; outputs beyond are padding, and do not count.

        Loads safetensors only, no code from the folder, nothing from a network.
        """
        self._vocab_size = vocab_size
        self.name = f"transformers {transformers.__version__}"
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        arguments = {"local_files_only": True, "trust_remote_code": False}
        try:
            with warnings.catch_warnings():
                # What the library and torch deprecate among themselves, seen when packed layers are first imported.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._model = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True, **arguments
                ).eval()
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **arguments)
        except Exception as exc:  # the library raises many kinds
            first_line = (str(exc).splitlines() or [""])[0]
            raise ExportError(f"{folder}: transformers cannot load it ({type(exc).__name__}: {first_line})") from exc

    @torch.no_grad()
    def log_probs(self, ids_T: Tensor, positions_P: Tensor) -> Tensor:
        """See Runtime."""
        with torch.compiler.set_stance("force_eager"):  # else its packed layers compile themselves for a minute
            logits_1PV: Tensor = self._model(input_ids=ids_T[None], logits_to_keep=positions_P).logits
        return logits_1PV[0, :, : self._vocab_size].double().log_softmax(-1)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text; names of special tokens in it are those tokens."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
