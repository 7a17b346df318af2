"""Tiny models of transformers with random weights and a tokenizer, in folders as the hub has them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

VOCAB = 300
PADDED = 320
_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_ONE_KEY_HEAD = {"num_key_value_heads": 1, "head_dim": 16}
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", {**_SHAPE, "num_key_value_heads": 1}, "model.layers.*"),
    "qwen3": ("Qwen3Config", {**_SHAPE, **_ONE_KEY_HEAD, "tie_word_embeddings": True}, "model.layers.*"),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, "transformer.h.*"),
    "gemma": ("Gemma3TextConfig", {**_SHAPE, **_ONE_KEY_HEAD, "sliding_window": 8}, "model.layers.*"),
}
"""By architecture: the class of its config, its settings, the pattern that names the linear layers of its blocks."""
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi": ("PhiConfig", _SHAPE),
    "granite": ("GraniteConfig", {**_SHAPE, "logits_scaling": 8.0}),
    "cohere": ("CohereConfig", _SHAPE),
    "opt": ("OPTConfig", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "word_embed_proj_dim": 16}),
    "phimoe": ("PhimoeConfig", {**_SHAPE, "num_key_value_heads": 1, "num_local_experts": 4}),
    "capped": ("Gemma2Config", {**_SHAPE, **_ONE_KEY_HEAD, "sliding_window": 8, "final_logit_softcapping": 3.0}),
}  # fmt: skip
"""What heads may do besides: add a bias, multiply by a constant, take narrower states, cap at 3; a router of its own."""


def write_model(
    folder: Path, kind: str, tokenizer_json: Path, outputs: int = VOCAB, seed: int = 0, **settings: Any
) -> Any:
    """The model as transformers writes it, its tokenizer beside it; weights large enough that its logits differ."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name, shape = OTHERS[kind] if kind in OTHERS else KINDS[kind][:2]
    config = getattr(transformers, name)(
        **{**shape, "vocab_size": outputs, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **settings}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
                elif parameter_name.endswith("bias"):
                    parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    return model


def write_tokenizer(path: Path, vocab_size: int = VOCAB) -> Path:
    """A byte-level BPE tokenizer of exactly so many ids."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f"def {a}{b}_{c}(self, {b}): return {a} + {c}" for a in "abcdef" for b in "ghijkl" for c in "mnopqr"]
    tokenizer.train_from_iterator(words, trainer)
    assert tokenizer.get_vocab_size() == vocab_size
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    return path


def write_corpus(path: Path, lines: int = 700) -> Path:
    """Text that the tokenizer above cuts into some fifteen tokens a line."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 6, (lines, 4), generator=generator).tolist()
    text = [f"def {'abcdef'[a]}{'ghijkl'[b]}_{'mnopqr'[c]}(self, x{d}): return {a} + {c}" for a, b, c, d in drawn]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def describe(folder: Path, **changes: Any) -> None:
    """Change keys of the description in a model's folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def in_hub_cache(cache: Path, name: str) -> Path:
    """The folder of `someone/NAME` in the hub's cache on a machine, where a download of its main branch would be."""
    repository = cache / f"models--someone--{name}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot
