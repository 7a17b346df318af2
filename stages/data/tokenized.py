"""A tokenized corpus as later steps find it: `data.json` and the windows of both splits."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from tristill.cache.hashing import fingerprint_of, sha256_of_file
from tristill.cache.layout import TOKENIZER_NAME
from tristill.cache.regular_file import read_json_object
from tristill.cache.spec import SplitName
from tristill.stages.data.tokenizer import load_tokenizer
from tristill.stages.data.tokens import TokenWindows, largest_id, num_windows_of
from tristill.stages.errors import CorpusError


class MaskedTokens(BaseModel):
    """Which tokens of a split count as labels: how many, and the fingerprint of the file that says so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: Annotated[int, Field(ge=0)]
    sha256: str


class TokenizedSplit(BaseModel):
    """One split, as counted while it was written. counted: of chats; None where all tokens count.

    text_bytes: of the tokens that count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    documents: int
    tokens: int
    text_bytes: int
    sha256: str
    counted: MaskedTokens | None = None

    @model_serializer(mode="wrap")
    def _without_a_mask_if_there_is_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.counted is None:
            fields.pop("counted", None)
        return fields

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of UTF-8 text per token that counts; special tokens count as tokens of no bytes."""
        return self.text_bytes / (self.counted.tokens if self.counted else self.tokens)


class TokenizedCorpus(BaseModel):
    """`data.json`: what the later stages know of the corpus.

    bos_id: the token that begins each window, if one does. end_of_turn_ids: of chats, what ends what is said.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: Annotated[int, Field(ge=2)]
    end_of_text_id: int
    bos_id: int | None = None
    context_length: int
    tokenizer_sha256: str
    splits: dict[SplitName, TokenizedSplit]
    end_of_turn_ids: tuple[int, ...] = ()

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.bos_id is None:
            fields.pop("bos_id", None)
        if not self.end_of_turn_ids:
            fields.pop("end_of_turn_ids", None)
        return fields

    @model_validator(mode="after")
    def _all_splits_are_alike(self) -> Self:
        if len({split.counted is None for split in self.splits.values()}) > 1:
            raise ValueError("found a mask for one split only, expected one for all or none")
        return self

    @property
    def is_masked(self) -> bool:
        """Whether only some tokens count as labels."""
        return any(split.counted is not None for split in self.splits.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the ids, the tokenizer and the window length."""
        return fingerprint_of(self.model_dump(mode="json", exclude={"end_of_turn_ids"}))

    def windows_fingerprint(self, split: SplitName, num_windows: int) -> str:
        """SHA-256 over what determines the first `num_windows` windows of a split."""
        found = self.splits[split]
        mask = [found.counted.sha256] if found.counted else []
        bos = [] if self.bos_id is None else [{"bos_id": self.bos_id}]
        return fingerprint_of([found.sha256, self.context_length, num_windows, *mask, *bos])

    def num_windows(self, split: SplitName) -> int:
        """Whole windows of a split."""
        return num_windows_of(self.splits[split].tokens, self.context_length, self.bos_id)


def corpus_of_model(data_folder: Path, vocab_size: int, model: str) -> TokenizedCorpus:
    """The corpus with no more ids than a model has. Raises CorpusError, with the token, if one of the others occurs.

    A tokenizer may know more ids than its model has rows: for pictures, for padding.
    """
    corpus = load_corpus(data_folder)
    if vocab_size >= corpus.vocab_size:
        return corpus
    largest = max(corpus.bos_id or 0, *(largest_id(data_folder / f"{split}.npy") for split in corpus.splits))
    if largest >= vocab_size:
        token = load_tokenizer(data_folder / "tokenizer.json").id_to_token(largest)
        raise CorpusError(
            f"{model}: has rows for {vocab_size:,} ids, and the tokens in {data_folder} hold id {largest} ({token!r}); "
            "give the model's own tokenizer, or text and settings without that token, and run `tristill tokenize "
            "--force`"
        )
    return corpus.model_copy(update={"vocab_size": vocab_size})


def mask_name(split: SplitName) -> str:
    """The file that says which tokens of a split count as labels."""
    return f"{split}-mask.npy"


def load_corpus(folder: Path) -> TokenizedCorpus:
    """The description of a finished tokenize step."""
    path = folder / "data.json"
    try:
        return TokenizedCorpus.model_validate(read_json_object(path))
    except (OSError, ValueError, ValidationError) as exc:
        raise CorpusError(f"{path}: cannot be read as a tokenized corpus ({exc}); run `tristill tokenize`") from exc


def content_fingerprint(folder: Path) -> str:
    """The fingerprint of a tokenized corpus from all bytes that are there now, whatever data.json says of them."""
    corpus = load_corpus(folder)
    splits = {}
    for name, split in corpus.splits.items():
        mask = {"sha256": sha256_of_file(folder / mask_name(name))} if split.counted else {}
        counted = split.counted and split.counted.model_copy(update=mask)
        found = {"sha256": sha256_of_file(folder / f"{name}.npy"), "counted": counted}
        splits[name] = split.model_copy(update=found)
    tokenizer = sha256_of_file(folder / TOKENIZER_NAME)
    return corpus.model_copy(update={"splits": splits, "tokenizer_sha256": tokenizer}).fingerprint


def split_windows(folder: Path, split: SplitName, max_windows: int | None = None) -> TokenWindows:
    """The windows of a split of a tokenized corpus."""
    corpus = load_corpus(folder)
    mask_path = folder / mask_name(split) if corpus.is_masked else None
    return TokenWindows(folder / f"{split}.npy", corpus.context_length, max_windows, mask_path, corpus.bos_id)
