"""The tokenizer: trained here as byte-level BPE, or an existing `tokenizer.json`."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stages.data.config import ExistingTokenizer, TrainedTokenizer
from stages.errors import TokenizerError
from stages.models.hub import fetch_model, is_hub_name

END_OF_TEXT = "<|endoftext|>"
_LONGEST_TOKEN_BYTES = 16


def train_tokenizer(config: TrainedTokenizer, texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE in GPT-2's form: every string has ids, and llama.cpp's `gpt-2` pre-tokenizer agrees with it.

    Sennrich et al. 2016, Neural Machine Translation of Rare Words with Subword Units; bytes as in Radford et al. 2019.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=_LONGEST_TOKEN_BYTES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(texts, config.train_bytes), trainer)
    return tokenizer


def existing_tokenizer(config: ExistingTokenizer) -> Tokenizer:
    """The tokenizer at `config.path`, checked to have the end-of-text token."""
    path = tokenizer_file(config)
    tokenizer = load_tokenizer(path)
    if tokenizer.token_to_id(config.end_of_text) is None:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        raise TokenizerError(
            f"{path}: found no token {config.end_of_text!r}; set data.tokenizer.end_of_text to one of its special "
            f"tokens: {special[:10]}"
        )
    return tokenizer


def tokenizer_file(config: ExistingTokenizer) -> Path:
    """The `tokenizer.json` that `config.path` is or holds."""
    path = tokenizer_place(config)
    return path / "tokenizer.json" if path.is_dir() else path


def tokenizer_place(config: ExistingTokenizer) -> Path:
    """The file or folder that `config.path` names; what is on the hub is fetched, without weights."""
    path = Path(config.path).expanduser()
    return path if path.exists() or not is_hub_name(path) else fetch_model(path, None, weights=False)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, without the truncation and padding that may be stored there."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # tokenizers raises bare Exception
        raise TokenizerError(f"{path}: cannot be read as a tokenizer.json ({exc})") from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _first_bytes(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
    for text in texts:
        yield text
        num_bytes -= len(text.encode("utf-8", errors="surrogatepass"))
        if num_bytes <= 0:
            return
