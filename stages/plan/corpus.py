"""How many tokens a corpus will have: of a small one by tokenising it, of a large one from a part of it."""

import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tristill.cache.spec import SplitName
from tristill.stages.data.config import (
    DataConfig,
    HuggingFaceDataset,
    RecordFiles,
    SyntheticText,
    TextFiles,
    TrainedTokenizer,
)
from tristill.stages.data.files import corpus_files, file_bytes
from tristill.stages.data.tokenized import load_corpus
from tristill.stages.errors import CorpusError

SMALL_BYTES = 32 * 2**20
_PART_TOKENS = 2**21
_PART_DOCUMENTS = 64
_SPLITS: tuple[SplitName, ...] = ("train", "validation")


@dataclass(frozen=True)
class CorpusInSmall:
    """config: of the part that is tokenized. is_whole: whether the part is all.

    Of a part, one of these says how much there is, else a limit does. share: of the bytes of all files, in those of the
    part; total_bytes: of text in all files; documents: of a synthetic corpus.
    """

    config: DataConfig
    is_whole: bool
    share: float | None = None
    total_bytes: int | None = None
    documents: int | None = None

    @property
    def is_limited(self) -> bool:
        """Whether a limit says how much there is."""
        return self.share is None and self.total_bytes is None and self.documents is None


def in_small(config: DataConfig, small_bytes: int = SMALL_BYTES) -> CorpusInSmall:
    """The whole corpus if its files have no more than `small_bytes`, else a part of it.

    That is files from all over the sorted list, with half as many bytes; of few large ones the first two million
    tokens. The text that a tokenizer is trained on shrinks with the corpus. Raises CorpusError where nothing says how
    much there is: of a data set, and of few large files of records, whose bytes are not those of their text.
    """
    source = config.source
    if isinstance(source, SyntheticText):
        documents = min(source.documents, _PART_DOCUMENTS)
        part = config.model_copy(update={"source": source.model_copy(update={"documents": documents})})
        return CorpusInSmall(part, is_whole=documents == source.documents, documents=source.documents)
    if isinstance(source, HuggingFaceDataset):
        return _limited(config, f"data set {source.path!r}")
    files = corpus_files(source)
    sizes = [file_bytes(file) for file in files]
    total = sum(sizes)
    if total <= small_bytes:
        return CorpusInSmall(config, is_whole=True, total_bytes=total)
    chosen = np.linspace(0, len(files) - 1, max(1, len(files) * small_bytes // (2 * total))).astype(int)
    share = sum(sizes[i] for i in chosen) / total
    if len(files) < 16 or share * total > small_bytes:
        if isinstance(source, RecordFiles):
            return _limited(config, f"record files ({len(files)}, {total:,} bytes, from {files[0]} on)")
        return CorpusInSmall(_cut(config), is_whole=False, total_bytes=total)
    paths = tuple(glob.escape(str(files[i])) for i in chosen)
    if isinstance(source, TextFiles | RecordFiles):
        source = source.model_copy(update={"paths": paths})
    else:
        source = TextFiles(kind="text", paths=paths)
    tokenizer = config.tokenizer
    if isinstance(tokenizer, TrainedTokenizer):
        tokenizer = tokenizer.model_copy(update={"train_bytes": max(2**20, round(share * tokenizer.train_bytes))})
    unlimited: dict[str, int | None] = {"max_train_tokens": None}
    if config.validation is None:
        unlimited["max_validation_tokens"] = None
    part = config.model_copy(update={"source": source, "tokenizer": tokenizer, **unlimited})
    return CorpusInSmall(part, is_whole=False, share=share)


def _limited(config: DataConfig, what: str) -> CorpusInSmall:
    """A corpus of which its limit says how much there is."""
    if config.max_train_tokens is None:
        raise CorpusError(
            f"{what}: found nothing that says how much text there is; set data.max_train_tokens, or run `tristill "
            "tokenize` first, to plan with what it finds"
        )
    return CorpusInSmall(_cut(config), is_whole=config.max_train_tokens <= _PART_TOKENS)


def _cut(config: DataConfig) -> DataConfig:
    """The corpus from its start on, to two million tokens."""
    train = min(_PART_TOKENS, config.max_train_tokens or _PART_TOKENS)
    most = max(2 * config.context_length, round(train * config.validation_fraction))
    validation = config.max_validation_tokens if config.validation else min(most, config.max_validation_tokens or most)
    tokenizer = config.tokenizer
    if isinstance(tokenizer, TrainedTokenizer):
        tokenizer = tokenizer.model_copy(update={"train_bytes": min(tokenizer.train_bytes, 4 * _PART_TOKENS)})
    return config.model_copy(
        update={"max_train_tokens": train, "max_validation_tokens": validation, "tokenizer": tokenizer}
    )


def expected_tokens(config: DataConfig, small: CorpusInSmall, data_folder: Path) -> dict[SplitName, int]:
    """Tokens per split of the whole corpus, from its part in `data_folder`: by bytes, up to the limits."""
    splits = load_corpus(data_folder).splits
    found = {split: splits[split].tokens for split in _SPLITS}
    has_own = config.validation is not None
    if small.is_whole:
        return found
    limits = {"train": config.max_train_tokens, "validation": config.max_validation_tokens}
    share = 0.0 if has_own else config.validation_fraction
    of_source = _SPLITS[:1] if has_own else _SPLITS
    num_found = sum(found[split] for split in of_source)
    if small.share is not None:
        all_tokens = num_found / small.share
    elif small.total_bytes is not None:
        all_tokens = small.total_bytes * num_found / sum(splits[split].text_bytes for split in of_source)
    elif small.documents is not None:
        all_tokens = small.documents * num_found / sum(splits[split].documents for split in of_source)
    else:
        assert config.max_train_tokens is not None, "a part was made only where it says how much there is"
        all_tokens = config.max_train_tokens / (1 - share)
    expected = {"train": all_tokens * (1 - share), "validation": found["validation"] if has_own else all_tokens * share}
    return {split: round(min(expected[split], limits[split] or expected[split])) for split in _SPLITS}
