"""What the models read."""

from itertools import accumulate

from tristill.pipeline.report.drawing import Line, lines
from tristill.pipeline.report.run import Run
from tristill.pipeline.report.section import Block, Entry, Figure, Missing, Section, Table, Text
from tristill.pipeline.units import bytes_text, count_text
from tristill.stages.data.tokenized import TokenizedCorpus
from tristill.stages.errors import CorpusError

_SOURCES = {
    "python-stdlib": "the Python standard library's sources",
    "text": "text files",
    "records": "files of records",
    "hf": "a data set",
    "synthetic": "text that a model wrote",
}


def data_section(run: Run) -> Section:
    """Sizes of both splits, and how the vocabulary is used."""
    folder = run.workspace.data
    if not (folder / "data.json").is_file():
        text = "The run has no tokens of its own; run tristill tokenize. A cache holds the windows that students read."
        return Section("data", "Data", [Missing(text)])
    from tristill.stages.data.frequencies import token_counts
    from tristill.stages.data.tokenized import load_corpus

    try:
        corpus, counts = load_corpus(folder), token_counts(folder)
    except CorpusError as exc:
        return Section("data", "Data", [Missing(str(exc))])
    blocks: list[Block] = [Text(_story(run, corpus)), _splits(corpus)]
    if counts:
        blocks.append(_frequencies(counts, corpus.vocab_size))
    return Section("data", "Data", blocks)


def _story(run: Run, corpus: TokenizedCorpus) -> str:
    config = run.workspace.config.data
    source = _SOURCES[config.source.kind]
    total = sum(split.tokens for split in corpus.splits.values())
    text = (
        f"The corpus is {f'chats of {source}' if config.chat_column else source}: {count_text(total)} tokens of a "
        f"vocabulary of {corpus.vocab_size:,}, cut into windows of {corpus.context_length} positions."
    )
    if not corpus.is_masked:
        return f"{text} Each position asks for the next token."
    counted = sum(split.counted.tokens for split in corpus.splits.values() if split.counted)
    return (
        f"{text} Only the assistant's turns are asked for: {count_text(counted)} tokens, {counted / total:.1%}, count, "
        "and all others are read only."
    )


def _splits(corpus: TokenizedCorpus) -> Table:
    header = ["split", "documents", "tokens", "text", "bytes/token"]
    caption = "The held-out split is made of whole documents."
    if corpus.is_masked:
        header[2:] = ["tokens", "tokens that count", "their text", "bytes/token"]
        caption += " Text, and bytes per token, are of the tokens that count."
    else:
        caption += " A token of end of text counts, and has no bytes."
    rows = [
        (
            name,
            f"{split.documents:,}",
            f"{split.tokens:,}",
            *([f"{split.counted.tokens:,}"] if split.counted else []),
            bytes_text(split.text_bytes),
            f"{split.bytes_per_token:.3f}",
        )
        for name, split in corpus.splits.items()
    ]
    return Table(header, rows, caption, title="Splits")


def _frequencies(counts: list[int], vocab_size: int) -> Figure:
    total = sum(counts)
    ranks = _spread(len(counts))
    shares = [counts[rank - 1] / total for rank in ranks]
    half = next(rank for rank, so_far in enumerate(accumulate(counts), start=1) if 2 * so_far >= total)
    entry = Entry("share of all tokens", "s1")
    return Figure(
        "token-frequencies",
        "How often each token occurs",
        lines([Line(entry, ranks, shares)], "token-frequencies", "token, by its rank", "share of all tokens",
              log_x=True, log_y=True, has_shares=True),
        f"Train split, from the most frequent token to the rarest, both axes logarithmic. {half:,} tokens make half of "
        f"them all; {len(counts):,} of {vocab_size:,} occur at all, over the first {count_text(total)}.",
    )  # fmt: skip


def _spread(last: int) -> list[int]:
    """Ranks from 1 to `last`, about evenly on a logarithmic axis."""
    return sorted({min(last, round(last ** (step / 200))) for step in range(201)})
