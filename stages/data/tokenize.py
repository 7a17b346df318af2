"""From a corpus to `train.npy`, `validation.npy`, `tokenizer.json` and `data.json`, in constant memory.

Of chats, `train-mask.npy` and `validation-mask.npy` too: for every token 1 if it is the assistant's, else 0.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from tokenizers import Tokenizer

from tristill.cache.arrays import ids_dtype
from tristill.cache.atomic import write_atomically
from tristill.cache.hashing import sha256_of_file
from tristill.cache.regular_file import read_json_object
from tristill.cache.spec import SplitName
from tristill.stages.data.chat import ChatTemplate, Document, assistant_tokens, special_ids
from tristill.stages.data.config import (
    AnySource,
    DataConfig,
    ExistingTokenizer,
    HuggingFaceDataset,
    PythonStdlib,
    RecordFiles,
    SyntheticText,
    TrainedTokenizer,
)
from tristill.stages.data.corpus import OnEmpty, chats, documents, is_validation
from tristill.stages.data.tokenized import MaskedTokens, TokenizedCorpus, TokenizedSplit, mask_name
from tristill.stages.data.tokenizer import (
    END_OF_TEXT,
    beginning_token,
    existing_tokenizer,
    interruptible,
    tokenizer_file,
    tokenizer_place,
    train_tokenizer,
)
from tristill.stages.data.tokens import TokenFileWriter, TokenWindows, token_file
from tristill.stages.errors import CorpusError, ExportError, TokenizerError
from tristill.stages.export.gguf_tokenizer import refuse_gguf_tokenizer
from tristill.stages.models.companions import SpecialIds, as_json, write_tokenizer
from tristill.stages.progress import Progress, say, waiting

_BATCH_CHARACTERS = 2**20
_HOLDERS = {"tools": "chats"}


def tokenize_corpus(config: DataConfig, folder: Path) -> TokenizedCorpus:
    """Write the token files of all splits and what belongs to them. Memory does not grow with the corpus."""
    datasets.disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    empty: dict[str, None] = {}
    readers = {of: _reader(config, source, folder, empty.setdefault) for of, source in _sources(config).items()}
    tokenizer, end_of_text_id = _tokenizer(config, readers[None], folder)
    bos_id = _bos_id(config, tokenizer)
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    limits: dict[SplitName, int | None] = {
        "train": config.max_train_tokens,
        "validation": config.max_validation_tokens,
    }
    left_out = 0
    ends: set[str] = set()
    not_shown: Counter[str] = Counter()
    with ExitStack() as stack:

        def writer(split: SplitName) -> _SplitWriter:
            ids = stack.enter_context(token_file(folder / f"{split}.npy", ids_dtype(vocab_size)))
            mask = stack.enter_context(token_file(folder / mask_name(split), "|u1")) if config.chat_column else None
            return _SplitWriter(ids, mask, limits.get(split))

        writers = {split: writer(split) for split in split_names(config)}
        progress = stack.enter_context(Progress("tokenize", None, "tokens"))
        for own, tokens in _of_all(readers, config, writers, tokenizer, end_of_text_id):
            if tokens.mask is not None and not tokens.mask.any():
                left_out += 1
                continue
            text = tokens.document.text
            progress.advance(writers[own or split_of(text, config)].append(tokens))
            ends.update(text[first:end] for first, end in tokens.document.ends)
            not_shown.update(tokens.document.left_out)
        _refuse_short(writers, config, left_out, bos_id)
    if empty:
        say(f"tokenize: skipped {len(empty):,} files that hold nothing: {', '.join(islice(empty, 3))}")
    if left_out:
        say(f"tokenize: left out {left_out:,} chats in which the assistant says nothing")
    if not_shown:
        kinds = ", ".join(f"{kind} of {count:,} {_HOLDERS.get(kind, 'turns')}" for kind, count in not_shown.items())
        say(f"tokenize: the chat template leaves out what the chats hold, and no student is taught it: {kinds}")
    end_ids = {token_id for end in ends if (token_id := tokenizer.token_to_id(end)) is not None}
    corpus = TokenizedCorpus(
        vocab_size=vocab_size,
        end_of_text_id=end_of_text_id,
        bos_id=bos_id,
        context_length=config.context_length,
        tokenizer_sha256=sha256_of_file(folder / "tokenizer.json"),
        splits={split: writers[split].described(folder, split) for split in writers},
        end_of_turn_ids=tuple(sorted(end_ids)),
    )
    if corpus.is_masked:
        _refuse_without_labels(corpus, folder)
    if corpus.end_of_turn_ids:
        _end_generation_at(corpus, folder)
    write_atomically(folder / "data.json", (corpus.model_dump_json(indent=2) + "\n").encode("utf-8"))
    return corpus


def _end_generation_at(corpus: TokenizedCorpus, folder: Path) -> None:
    """Adds the ends of turns to those in generation_config.json, which goes with the tokenizer to every model."""
    path = folder / "generation_config.json"
    found = read_json_object(path) if path.is_file() else {}
    ends = dict.fromkeys([*SpecialIds.of(folder).ends, *corpus.end_of_turn_ids, corpus.end_of_text_id])
    write_atomically(path, as_json({**found, "eos_token_id": list(ends)}))


def split_names(config: DataConfig) -> tuple[SplitName, ...]:
    """The splits of a corpus."""
    return ("train", "validation", *(() if config.test is None else ("test",)))


def split_of(document: str, config: DataConfig) -> SplitName:
    """Where a document of data.source goes."""
    return "validation" if config.validation is None and is_validation(document, config) else "train"


def _sources(config: DataConfig) -> dict[SplitName | None, AnySource]:
    """Every source, by the split that all of it is for; None: data.source, whose documents are shared out."""
    held_out: list[tuple[SplitName | None, AnySource]] = list(config.held_out.items())
    return dict([(None, config.source), *held_out])


def _of_all(
    readers: Mapping[SplitName | None, Callable[[], Iterator[Document]]],
    config: DataConfig,
    writers: "Mapping[SplitName, _SplitWriter]",
    tokenizer: Tokenizer,
    end_of_text_id: int,
) -> "Iterator[tuple[SplitName | None, _Tokens]]":
    """The documents of every source, until the splits that it fills are full."""
    for own, read_documents in readers.items():
        filled = [own] if own else [split for split in writers if split not in config.held_out]
        for tokens in _tokenized(read_documents(), tokenizer, end_of_text_id):
            yield own, tokens
            if all(writers[split].is_full for split in filled):
                break


class _Tokens(NamedTuple):
    """A document's ids with the end of text. mask: which ids count, None if all do; text_bytes: of those that do."""

    document: Document
    ids: list[int]
    mask: np.ndarray | None
    text_bytes: int


class _SplitWriter:
    """The files of one split and what they hold so far."""

    def __init__(self, ids: TokenFileWriter, mask: TokenFileWriter | None, limit: int | None) -> None:
        self._ids = ids
        self._mask = mask
        self._limit = limit
        self._documents = self._text_bytes = self.counted = 0

    @property
    def num_documents(self) -> int:
        """Documents of which something was written."""
        return self._documents

    @property
    def num_tokens(self) -> int:
        """Tokens written."""
        return self._ids.num_tokens

    @property
    def is_full(self) -> bool:
        """Whether the limit, if there is one, is reached."""
        return self._limit is not None and self.num_tokens >= self._limit

    def append(self, tokens: _Tokens) -> int:
        """Write as much of a document as the limit allows; the number of its tokens that were."""
        num_new = len(tokens.ids) if self._limit is None else min(len(tokens.ids), self._limit - self.num_tokens)
        self._ids.append(tokens.ids[:num_new])
        counted, of = num_new, len(tokens.ids)
        if self._mask is not None and tokens.mask is not None:
            self._mask.append(tokens.mask[:num_new])
            counted, of = int(tokens.mask[:num_new].sum()), int(tokens.mask.sum())
        self.counted += counted
        self._documents += bool(num_new)
        # A document that a limit cuts counts with the share of its bytes that its kept tokens have.
        self._text_bytes += round(tokens.text_bytes * counted / of)
        return num_new

    def described(self, folder: Path, split: SplitName) -> TokenizedSplit:
        """The finished files."""
        counted = None
        if self._mask is not None:
            counted = MaskedTokens(tokens=self.counted, sha256=sha256_of_file(folder / mask_name(split)))
        return TokenizedSplit(
            documents=self._documents,
            tokens=self.num_tokens,
            text_bytes=self._text_bytes,
            sha256=sha256_of_file(folder / f"{split}.npy"),
            counted=counted,
        )


def _tokenized(documents: Iterator[Document], tokenizer: Tokenizer, end_of_text_id: int) -> Iterator[_Tokens]:
    special = special_ids(tokenizer) | {end_of_text_id}
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        if batch[0].assistant is None:
            encodings = interruptible(partial(tokenizer.encode_batch_fast, texts, add_special_tokens=False))
            for document, encoding in zip(batch, encodings, strict=True):
                yield _Tokens(document, [*encoding.ids, end_of_text_id], None, len(document.text.encode("utf-8")))
            continue
        encodings = interruptible(partial(tokenizer.encode_batch, texts, add_special_tokens=False))
        for document, encoding in zip(batch, encodings, strict=True):
            ids, mask, text_bytes = assistant_tokens(document, encoding, special, end_of_text_id)
            yield _Tokens(document, ids, mask, text_bytes)


def _reader(config: DataConfig, source: AnySource, folder: Path, on_empty: OnEmpty) -> Callable[[], Iterator[Document]]:
    """What goes through the documents of a source, once a call; a synthetic corpus is written first."""
    if isinstance(source, PythonStdlib):  # whose empty files are nobody's mistake
        return lambda: map(Document, documents(source))
    if isinstance(source, RecordFiles | HuggingFaceDataset) and source.chat_column is not None:
        assert isinstance(config.tokenizer, ExistingTokenizer), "checked with the config"
        return partial(chats, source, ChatTemplate(tokenizer_place(config.tokenizer)), on_empty)
    if not isinstance(source, SyntheticText):
        return lambda: map(Document, documents(source, on_empty))
    from tristill.stages.data.synthetic import (  # loads torch, which no other source needs
        write_synthetic,
        written_documents,
    )

    parts = write_synthetic(source, folder / "synthetic")
    return lambda: map(Document, written_documents(parts))


def _tokenizer(
    config: DataConfig, read_documents: Callable[[], Iterator[Document]], folder: Path
) -> tuple[Tokenizer, int]:
    """The tokenizer and its end-of-text id; it is written into the folder, an existing one byte for byte."""
    if isinstance(config.tokenizer, TrainedTokenizer):
        texts = (found.text for found in read_documents() if split_of(found.text, config) == "train")
        with waiting("tokenizer"):
            tokenizer, end_of_text = train_tokenizer(config.tokenizer, texts), END_OF_TEXT
        write_atomically(folder / "tokenizer.json", tokenizer.to_str().encode("utf-8"))
    else:
        tokenizer, end_of_text = existing_tokenizer(config.tokenizer), config.tokenizer.end_of_text
        write_tokenizer(tokenizer_file(config.tokenizer), folder)
        try:
            refuse_gguf_tokenizer(folder / "tokenizer.json", max(tokenizer.get_vocab().values()) + 1)
        except (ExportError, TokenizerError) as exc:
            say(f"tokenize: `tristill export --format gguf` will refuse this tokenizer: {exc}")
    end_of_text_id = tokenizer.token_to_id(end_of_text)
    assert end_of_text_id is not None, "both kinds of tokenizer were made or checked to have it"
    return tokenizer, end_of_text_id


def _bos_id(config: DataConfig, tokenizer: Tokenizer) -> int | None:
    """The token that begins each window; None if none does."""
    given = config.tokenizer
    if isinstance(given, TrainedTokenizer) or given.bos_token is False:
        return None
    token = given.bos_token or beginning_token(tokenizer_place(given), tokenizer)
    if token is None:
        return None
    bos_id: int | None = tokenizer.token_to_id(token)
    if bos_id is None:
        raise TokenizerError(
            f"{given.path}: found no token {token!r} to begin windows with; set data.tokenizer.bos_token to one "
            "that it has, or to false"
        )
    say(
        f"tokenize: each window begins with {token}, as texts of this tokenizer do: 1 of {config.context_length:,} "
        "positions has nothing else before its label (data.tokenizer.bos_token)"
    )
    return bos_id


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _refuse_short(
    writers: Mapping[SplitName, _SplitWriter], config: DataConfig, left_out: int, bos_id: int | None
) -> None:
    if not any(writer.num_tokens for writer in writers.values()):
        found = f"the assistant says nothing in any of its {left_out:,} chats" if left_out else "found no text in it"
        raise CorpusError(f"the corpus ({config.source.kind}) is empty: {found}")
    for split, writer in writers.items():
        needed = config.context_length + (bos_id is None)
        if writer.num_tokens < needed:
            raise CorpusError(
                f"the {split} split is shorter than one window: found {writer.num_documents:,} documents of "
                f"{writer.num_tokens:,} tokens in all, expected at least {needed:,} tokens; {_way_out(split, config)}"
            )


def _way_out(split: SplitName, config: DataConfig) -> str:
    """What makes a split longer."""
    limit = {"train": config.max_train_tokens, "validation": config.max_validation_tokens}.get(split)
    if limit is not None and limit <= config.context_length:
        return f"raise data.max_{split}_tokens from {limit:,}, or lower data.context_length"
    own = config.held_out.get(split) if split != "train" else None
    source, name = (own, f"data.{split}") if own else (config.source, "data.source")
    ways = [f"give more text in {name}", "lower data.context_length"]
    if own is None and config.validation is None:
        change = "raise" if split == "validation" else "lower"
        ways += [f"{change} data.validation_fraction", "name held-out text of its own in data.validation"]
    if getattr(source, "documents", None) == "file":
        ways.append(f"set {name}.documents to 'paragraph' or 'line' (one file is one document now)")
    return f"{', '.join(ways[:-1])}, or {ways[-1]}"


def _refuse_without_labels(corpus: TokenizedCorpus, folder: Path) -> None:
    for split, found in corpus.splits.items():
        windows = TokenWindows(
            folder / f"{split}.npy", corpus.context_length, mask_path=folder / mask_name(split), bos_id=corpus.bos_id
        )
        if not windows.counts().any():
            raise CorpusError(
                f"the {split} split: found nothing of the assistant's in its {windows.num_windows} windows, whose "
                "losses would be of nothing; give more chats, or change data.context_length or "
                "data.validation_fraction"
            )
        if not found.text_bytes:
            raise CorpusError(
                f"the {split} split: found no text in what the assistant says in its {found.documents:,} chats, only "
                "the tokens that end its turns; give chats in which it says something"
            )
