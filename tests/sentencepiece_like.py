"""A tokenizer of SentencePiece's kind: spaces as pieces of words, bytes for what is not spelled."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a few pieces, and a token for every byte of what they do not spell."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = ["\u2581", "a", "b", "\u2581hi", "\u00e9", "\ufffd"]
    vocabulary = {text: n for n, text in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=special[0], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    replaced, stripped = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replaced, decoders.ByteFallback(), decoders.Fuse(), stripped])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return tokenizer


SENTENCEPIECE = sentencepiece()
ROCKET = [SENTENCEPIECE.token_to_id(f"<0x{byte:02X}>") for byte in "\U0001f680".encode()]
