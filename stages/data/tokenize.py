"""From a corpus to `train.npy`, `validation.npy`, `tokenizer.json` and `data.json`, in constant memory."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import datasets
from tokenizers import Tokenizer

from cache.arrays import ids_dtype
from cache.atomic import write_atomically
from cache.hashing import sha256_of_file
from cache.spec import SplitName
from stages.data.config import DataConfig, SyntheticText, TrainedTokenizer
from stages.data.corpus import documents, is_validation
from stages.data.tokenized import TokenizedCorpus, TokenizedSplit
from stages.data.tokenizer import END_OF_TEXT, existing_tokenizer, tokenizer_file, train_tokenizer
from stages.data.tokens import TokenFileWriter, token_file
from stages.errors import CorpusError
from stages.progress import Progress, waiting

_BATCH_CHARACTERS = 2**20


def tokenize_corpus(config: DataConfig, folder: Path) -> TokenizedCorpus:
    """Write the token files of both splits and what belongs to them. Memory does not grow with the corpus."""
    datasets.disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    read_documents = _reader(config, folder)
    tokenizer, tokenizer_json, end_of_text_id = _tokenizer(config, read_documents)
    write_atomically(folder / "tokenizer.json", tokenizer_json)
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    dtype = ids_dtype(vocab_size)
    counts = {"train": [0, 0], "validation": [0, 0]}
    limits = {"train": config.max_train_tokens, "validation": config.max_validation_tokens}
    with ExitStack() as stack:
        writers = {split: stack.enter_context(token_file(folder / f"{split}.npy", dtype)) for split in counts}
        progress = stack.enter_context(Progress("tokenize", None, "tokens"))
        for batch in _batches(read_documents()):
            for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
                split = "validation" if is_validation(text, config) else "train"
                num_new = _append(writers[split], [*encoding.ids, end_of_text_id], limits[split])
                counts[split][0] += bool(num_new)
                # A document that a limit cuts counts with the share of its bytes that its kept tokens have.
                counts[split][1] += round(len(text.encode("utf-8")) * num_new / (len(encoding.ids) + 1))
                progress.advance(num_new)
            if all(limit is not None and writers[split].num_tokens >= limit for split, limit in limits.items()):
                break
        tokens = {split: writer.num_tokens for split, writer in writers.items()}
        _refuse_short(tokens, config)
    corpus = TokenizedCorpus(
        vocab_size=vocab_size,
        end_of_text_id=end_of_text_id,
        context_length=config.context_length,
        tokenizer_sha256=sha256_of_file(folder / "tokenizer.json"),
        splits={
            "train": _split(folder, "train", counts["train"], tokens["train"]),
            "validation": _split(folder, "validation", counts["validation"], tokens["validation"]),
        },
    )
    write_atomically(folder / "data.json", (corpus.model_dump_json(indent=2) + "\n").encode("utf-8"))
    return corpus


def _reader(config: DataConfig, folder: Path) -> Callable[[], Iterator[str]]:
    """What goes through the documents, once a call; a synthetic corpus is written first."""
    if not isinstance(config.source, SyntheticText):
        return partial(documents, config.source)
    from stages.data.synthetic import write_synthetic, written_documents  # loads torch, which no other source needs

    return partial(written_documents, write_synthetic(config.source, folder / "synthetic"))


def _tokenizer(config: DataConfig, read_documents: Callable[[], Iterator[str]]) -> tuple[Tokenizer, bytes, int]:
    """The tokenizer, its `tokenizer.json` and its end-of-text id; the file of an existing one is kept byte for byte."""
    if isinstance(config.tokenizer, TrainedTokenizer):
        texts = (text for text in read_documents() if not is_validation(text, config))
        with waiting("tokenizer"):
            tokenizer, end_of_text = train_tokenizer(config.tokenizer, texts), END_OF_TEXT
        tokenizer_json = tokenizer.to_str().encode("utf-8")
    else:
        tokenizer, end_of_text = existing_tokenizer(config.tokenizer), config.tokenizer.end_of_text
        tokenizer_json = tokenizer_file(config.tokenizer).read_bytes()
    end_of_text_id = tokenizer.token_to_id(end_of_text)
    assert end_of_text_id is not None, "both kinds of tokenizer were made or checked to have it"
    return tokenizer, tokenizer_json, end_of_text_id


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _append(writer: TokenFileWriter, ids: list[int], limit: int | None) -> int:
    kept = ids if limit is None else ids[: max(0, limit - writer.num_tokens)]
    writer.append(kept)
    return len(kept)


def _refuse_short(tokens: dict[str, int], config: DataConfig) -> None:
    if not any(tokens.values()):
        raise CorpusError(f"the corpus ({config.source.kind}) is empty: found no text in it")
    for split, num_tokens in tokens.items():
        if num_tokens <= config.context_length:
            raise CorpusError(
                f"the {split} split is shorter than one window: found {num_tokens} tokens, expected at least "
                f"{config.context_length + 1}; give more text, or change data.context_length, "
                "data.validation_fraction or, where one file is one document, data.source.documents"
            )


def _split(folder: Path, split: SplitName, counts: list[int], tokens: int) -> TokenizedSplit:
    return TokenizedSplit(
        documents=counts[0], tokens=tokens, text_bytes=counts[1], sha256=sha256_of_file(folder / f"{split}.npy")
    )
