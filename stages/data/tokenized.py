"""A tokenized corpus as later steps find it: `data.json` and the windows of both splits."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cache.hashing import fingerprint_of
from cache.spec import SplitName
from stages.data.tokens import TokenWindows
from stages.errors import CorpusError


class TokenizedSplit(BaseModel):
    """One split, as counted while it was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    documents: int
    tokens: int
    text_bytes: int
    sha256: str

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of UTF-8 text per token; end-of-text tokens count as tokens of no bytes."""
        return self.text_bytes / self.tokens


class TokenizedCorpus(BaseModel):
    """`data.json`: what the later stages know of the corpus."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: Annotated[int, Field(ge=2)]
    end_of_text_id: int
    context_length: int
    tokenizer_sha256: str
    splits: dict[SplitName, TokenizedSplit]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the ids, the tokenizer and the window length."""
        return fingerprint_of(self.model_dump(mode="json"))

    def windows_fingerprint(self, split: SplitName, num_windows: int) -> str:
        """SHA-256 over what determines the first `num_windows` windows of a split."""
        return fingerprint_of([self.splits[split].sha256, self.context_length, num_windows])


def load_corpus(folder: Path) -> TokenizedCorpus:
    """The description of a finished tokenize step."""
    path = folder / "data.json"
    try:
        return TokenizedCorpus.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError, ValidationError) as exc:
        raise CorpusError(f"{path}: cannot be read as a tokenized corpus ({exc}); run `tristill tokenize`") from exc


def split_windows(folder: Path, split: SplitName, max_windows: int | None = None) -> TokenWindows:
    """The windows of a split of a tokenized corpus."""
    return TokenWindows(folder / f"{split}.npy", load_corpus(folder).context_length, max_windows)
