"""The tokenizer: trained here as byte-level BPE, or an existing `tokenizer.json`."""

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TypeVar

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tristill.cache.regular_file import read_json_object
from tristill.stages.data.config import ExistingTokenizer, TrainedTokenizer
from tristill.stages.errors import TokenizerError
from tristill.stages.models.origin import fetch_model, is_hub_name
from tristill.stages.progress import say
from tristill.stages.tokenizer_file import load_tokenizer

__all__ = [
    "END_OF_TEXT",
    "existing_tokenizer",
    "load_tokenizer",
    "tokenizer_file",
    "tokenizer_place",
    "train_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"
_LONGEST_TOKEN_BYTES = 16
_LONGEST_WORD = 512
_LONG_RUN = re.compile(
    "|".join(rf"{kind}{{{_LONGEST_WORD + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s"))
)
_T = TypeVar("_T")


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
    bounded = _BoundedWords(_first_bytes(texts, config.train_bytes))
    interruptible(lambda: tokenizer.train_from_iterator(bounded, trainer))
    if bounded.num_cut:
        say(
            f"tokenizer: cut {bounded.num_cut:,} words of more than {_LONGEST_WORD} characters to train on; text "
            "without spaces has no words to learn from"
        )
    return tokenizer


class _BoundedWords:
    """The texts, cut within runs that the pre-tokenizer takes for one very long word.

    Training takes time that grows with the square of a word's length. No run of ordinary text is so long, so that its
    tokenizer is not changed.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.num_cut = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            first = 0
            for run in _LONG_RUN.finditer(text):
                self.num_cut += 1
                for cut in range(run.start() + _LONGEST_WORD, run.end(), _LONGEST_WORD):
                    yield text[first:cut]
                    first = cut
            yield text[first:]


def interruptible(call: Callable[[], _T]) -> _T:
    """The result of a call of a library that looks at no signals, made in a thread, so that Ctrl-C need not wait."""
    outcome: Future[_T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as exc:  # noqa: BLE001 - raised to the caller; a panic of Rust is no Exception
            outcome.set_exception(exc)

    Thread(target=work, daemon=True).start()
    return outcome.result()


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


def beginning_token(place: Path, tokenizer: Tokenizer) -> str | None:
    """The beginning-of-sequence token that is put before a text; None if none is.

    place: the folder or file of `tokenizer`. `add_bos_token` in the tokenizer_config.json beside it decides, else the
    tokenizer's own post-processor, if it puts one token before a text.
    """
    about = place / "tokenizer_config.json" if place.is_dir() else place.with_name("tokenizer_config.json")
    try:
        settings = read_json_object(about) if about.is_file() else {}
    except (OSError, ValueError) as exc:
        raise TokenizerError(f"{about}: cannot be read ({exc})") from exc
    if settings.get("add_bos_token") is False:
        return None
    plain, processed = (tokenizer.encode("a", add_special_tokens=adds) for adds in (False, True))
    ids = processed.ids
    before = next((n for n in range(len(ids)) if ids[n:][: len(plain.ids)] == plain.ids), 0) if plain.ids else 0
    if before == 1:
        return tokenizer.id_to_token(ids[0])
    named = settings.get("bos_token")
    named = named.get("content") if isinstance(named, dict) else named
    return named if settings.get("add_bos_token") is True and isinstance(named, str) else None


def tokenizer_file(config: ExistingTokenizer) -> Path:
    """The `tokenizer.json` that `config.path` is or holds."""
    path = tokenizer_place(config)
    return path / "tokenizer.json" if path.is_dir() else path


def tokenizer_place(config: ExistingTokenizer) -> Path:
    """The file or folder that `config.path` names; what is on the hub is fetched, without weights."""
    path = Path(config.path).expanduser()
    return path if path.exists() or not is_hub_name(path) else fetch_model(path, None, weights=False)


def _first_bytes(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
    for text in texts:
        yield text
        num_bytes -= len(text.encode("utf-8", errors="surrogatepass"))
        if num_bytes <= 0:
            return
