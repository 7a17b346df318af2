"""Whether an exported tokenizer makes the same ids: on held-out text, and on strings that tokenizers differ over."""

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer
from torch import Tensor

from tristill.stages.errors import ExportError

_STRINGS = (
    "Hello world",
    " leading and trailing ",
    "  two  three   spaces\t\ttabs \n\n\n lines \r\n\r\n end   ",
    "def f(x):\n    return {'a': [1, 22, 333], \"b\": x**2 - 0x1F}  # it's, we'll, I'd\n",
    "1234567890 3.14159 1,000,000 12:34:56 2 22 222 2222",
    "\u00e9\u00e8 na\u00efve Stra\u00dfe \u0416\u0443\u043a \u4f60\u597d\u4e16\u754c",
    "\u3053\u3093 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f469\u200d\U0001f4bb e\u0301 \u00a0\u2003\u200b\ufeff \u2026 \u00ab\u00bb \ud7a3",
    "!!!???...---___***///\\\\\\```~~~ <|> <||> <| |> |>",
    "DON'T Don't don't DON\u2019T 'tis '''",
    "\x00\x01\x7f\x1b[0m",
)
_MOST_ADDED_TOKENS = 50


def tokenizer_parity(
    tokenizer: Tokenizer,
    tokenize: Callable[[str], list[int]],
    windows: Sequence[Tensor],
    name: str,
) -> int:
    """The number of texts that were compared. Raises ExportError with the first text of other ids."""
    texts = [*_STRINGS]
    for added in list(tokenizer.get_added_tokens_decoder().values())[:_MOST_ADDED_TOKENS]:
        token = added.content
        texts += [token, f"a{token}b {token}\n{token}{token}"]
    texts += [tokenizer.decode(ids_T.tolist(), skip_special_tokens=False) for ids_T in windows]
    for text in texts:
        expected, found = tokenizer.encode(text, add_special_tokens=False).ids, tokenize(text)
        if found != expected:
            first = next((n for n, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), 0)
            raise ExportError(
                f"the tokenizer that {name} finds there makes other ids: of {text[:60]!r}, from id {first} on, found "
                f"{found[first : first + 5]}, expected {expected[first : first + 5]}; nothing was kept"
            )
    return len(texts)
