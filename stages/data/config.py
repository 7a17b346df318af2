"""Settings of the corpus, its split and its tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from tristill.cache.spec import SplitName
from tristill.cache.store import check_url
from tristill.stages.settings import ALWAYS_OUTSIDE, OUTSIDE, Section, neutral


def _plain_urls(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(check_url(path) if "://" in path else path for path in paths)


Paths = Annotated[
    tuple[str, ...],
    OUTSIDE,
    Field(
        min_length=1,
        description="files, folders (all files in them) and globs, of this machine (~ is expanded) or at URLs such as "
        "s3://bucket/folder",
    ),
    AfterValidator(_plain_urls),
]


class PythonStdlib(Section):
    """The source files of the Python standard library of this machine: real English and code, nothing to download.

    What it holds depends on the Python version; the fingerprints in data.json tell two machines apart.
    """

    kind: Annotated[Literal["python-stdlib"], Field(description="this source")] = "python-stdlib"


class TextFiles(Section):
    """Text files in UTF-8, plain or compressed (gzip, bzip2, xz, Zstandard, LZ4); empty ones are skipped."""

    kind: Annotated[Literal["text"], Field(description="this source")]
    paths: Paths
    documents: Annotated[
        Literal["file", "paragraph", "line"],
        Field(
            description="what one document is; documents are the unit of the train/validation split and must fit in "
            "memory, so a corpus in one large file needs `paragraph` (ends at a line of nothing or blanks) or `line`"
        ),
    ] = "file"


class _Rows(Section):
    """Rows of a table, of which one column is read: text, or chats."""

    text_column: Annotated[str, Field(description="column that holds the text")] = "text"
    chat_column: Annotated[
        str | None,
        Field(
            description="column that holds chats, in place of text: lists of {role, content} or {from, value}, or "
            "prompts with an answer in another column; rendered by the chat template of the tokenizer's folder, with "
            "loss on the assistant's turns alone; none reads text_column"
        ),
    ] = None

    @model_validator(mode="after")
    def _text_or_chats(self) -> Self:
        if self.chat_column is not None and self.text_column != "text":
            raise ValueError(
                f"found text_column {self.text_column!r} and chat_column {self.chat_column!r}; give one of them"
            )
        return self


class RecordFiles(_Rows):
    """Files of records, told by their suffixes: JSON (.jsonl, .ndjson, .json), Parquet (.parquet), Arrow (.arrow).

    JSON is an object per line or one list of objects, plain or compressed (.jsonl.gz and so on). Empty files are
    skipped, and other columns than those asked for are not read.
    """

    kind: Annotated[Literal["records"], Field(description="this source")]
    paths: Paths


class HuggingFaceDataset(_Rows):
    """Anything that `datasets.load_dataset` loads: hub names, local folders and files."""

    newer: ClassVar[tuple[str, ...]] = ("chat_column",)

    kind: Annotated[Literal["hf"], Field(description="this source")]
    path: Annotated[
        str,
        ALWAYS_OUTSIDE,
        Field(description="first argument of load_dataset: hub name, builder (json, parquet) or folder"),
    ]
    name: Annotated[str | None, Field(description="configuration of the data set; none if it has but one")] = None
    split: Annotated[str, Field(description="split to read; ours into train and validation is made from it")] = "train"
    streaming: Annotated[bool, Field(description="read as it comes instead of downloading and preparing first")] = True
    arguments: Annotated[
        dict[str, Any],
        ALWAYS_OUTSIDE,
        Field(default_factory=dict, description="further arguments of load_dataset, such as data_files"),
    ]

    @field_validator("arguments")
    @classmethod
    def _arguments_repeat_no_field(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if repeated := sorted(arguments.keys() & {"path", "name", "split", "streaming", "trust_remote_code"}):
            raise ValueError(f"{repeated} cannot be given here; path, name, split and streaming are fields beside it")
        return arguments


class SyntheticText(Section):
    """Text that a causal language model writes, from prompts or from nothing.

    It is written once into data/synthetic of the run folder; from there on it is a corpus like any other.
    """

    kind: Annotated[Literal["synthetic"], Field(description="this source")]
    model: Annotated[
        Path,
        OUTSIDE,
        Field(
            description="folder of the model, with its tokenizer.json: a teacher or student of ours, or any causal "
            "language model of transformers in safetensors (extra `hf`)"
        ),
    ]
    documents: Annotated[int, Field(ge=1, description="documents to write")] = 1000
    max_tokens: Annotated[
        int, Field(ge=1, le=2**20, description="longest document, in the model's tokens, prompt not counted")
    ] = 256
    temperature: Annotated[
        float, Field(ge=1e-3, le=100, description="of the distribution that tokens are drawn from; small is greedy")
    ] = 1.0
    top_p: Annotated[
        float, Field(gt=0, le=1, description="draw from the fewest tokens with this share of probability; 1 is all")
    ] = 0.95
    seed: Annotated[int, Field(ge=0, description="of the draws")] = 0
    prompts: Annotated[
        Path | None,
        OUTSIDE,
        Field(
            description="UTF-8 file with a prompt per line, taken in turn; a document is a prompt and what follows. "
            "None writes from nothing: from the token that the model knows before a text"
        ),
    ] = None
    batch_documents: Annotated[
        int, Field(ge=1, description="documents written at a time, and kept together by an interruption")
    ] = 64
    device: Annotated[str | None, neutral("cpu, cuda, cuda:1 ..; none takes CUDA if there is one")] = None


class TrainedTokenizer(Section):
    """A byte-level BPE tokenizer, trained on the train split."""

    kind: Annotated[Literal["bpe"], Field(description="this tokenizer")] = "bpe"
    vocab_size: Annotated[
        int,
        Field(
            ge=257, le=2**24, description="entries wanted: 256 bytes, merges and end of text; fewer if text is short"
        ),
    ] = 2048
    train_bytes: Annotated[
        int, Field(ge=1, description="bytes of text to train on, from the start of the train split")
    ] = 64 * 2**20


class ExistingTokenizer(Section):
    """A tokenizer that is already there."""

    newer: ClassVar[tuple[str, ...]] = ("bos_token",)

    kind: Annotated[Literal["file"], Field(description="this tokenizer")]
    path: Annotated[
        str,
        OUTSIDE,
        Field(
            description="a tokenizer.json, a Hugging Face folder that holds one, or a name on the hub; for chats no "
            "file, but a folder with its chat template"
        ),
    ]
    end_of_text: Annotated[str, Field(description="token that separates documents")] = "<|endoftext|>"
    bos_token: Annotated[
        Literal[False] | str | None,
        Field(
            description="beginning-of-sequence token (BOS) that begins each window, so that one position in "
            "context_length has nothing but it before its label; false for none. None follows the tokenizer: the token "
            "that its post-processor, or add_bos_token in its tokenizer_config.json, puts before a text"
        ),
    ] = None


ReadSource = PythonStdlib | TextFiles | RecordFiles | HuggingFaceDataset
AnySource = ReadSource | SyntheticText


def _holds_chats(source: AnySource) -> bool:
    return isinstance(source, RecordFiles | HuggingFaceDataset) and source.chat_column is not None


class DataConfig(Section):
    """From a corpus to windows of token ids."""

    newer: ClassVar[tuple[str, ...]] = ("validation", "test")

    source: Annotated[AnySource, Field(discriminator="kind", description="where the text is from")] = PythonStdlib()
    validation: Annotated[
        ReadSource | None,
        Field(
            discriminator="kind",
            description="source of the held-out text to choose on, such as a published split; all of `source` is then "
            "for training. None holds out validation_fraction of `source`",
        ),
    ] = None
    test: Annotated[
        ReadSource | None,
        Field(discriminator="kind", description="source of the held-out text to report on; None has no such split"),
    ] = None
    tokenizer: Annotated[
        TrainedTokenizer | ExistingTokenizer, Field(discriminator="kind", description="trained here, or given")
    ] = TrainedTokenizer()
    context_length: Annotated[int, Field(ge=1, le=2**20, description="positions per window")] = 256
    validation_fraction: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="share of documents held out, chosen by a hash of their content; unused where `validation` "
            "names a source",
        ),
    ] = 0.05
    max_train_tokens: Annotated[int | None, Field(ge=1, description="cut the train split; none keeps all")] = None
    max_validation_tokens: Annotated[int | None, Field(ge=1, description="cut the validation split likewise")] = None

    @property
    def held_out(self) -> Mapping[SplitName, ReadSource]:
        """The sources of held-out text, by the split that they are for."""
        found: dict[SplitName, ReadSource | None] = {"validation": self.validation, "test": self.test}
        return {split: source for split, source in found.items() if source is not None}

    @property
    def chat_column(self) -> str | None:
        """The column of chats; None if the corpus is plain text."""
        return self.source.chat_column if isinstance(self.source, RecordFiles | HuggingFaceDataset) else None

    @model_validator(mode="after")
    def _all_sources_are_alike(self) -> Self:
        kinds = {True: "chats", False: "plain text"}
        for split, source in self.held_out.items():
            found, expected = kinds[_holds_chats(source)], kinds[_holds_chats(self.source)]
            if found != expected:
                raise ValueError(
                    f"{split}: found {found}, expected {expected} as in source; give chat_column for both or neither"
                )
        return self

    @model_validator(mode="after")
    def _chats_have_a_template(self) -> Self:
        if self.chat_column is not None and not isinstance(self.tokenizer, ExistingTokenizer):
            raise ValueError(
                f"source.chat_column: found {self.chat_column!r} with tokenizer.kind {self.tokenizer.kind!r}, which "
                "has no chat template; set tokenizer = { kind = 'file', path = .. } to a Hugging Face folder with one"
            )
        return self
