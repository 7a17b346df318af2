"""Synthetic corpora: any causal model writes them, each part on its own, and nothing of another model is mixed in."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from conftest import ROOT
from tristill.stages.data.config import DataConfig, SyntheticText, TrainedTokenizer
from tristill.stages.data.files import corpus_signature
from tristill.stages.data.synthetic import write_synthetic, written_documents
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.data.tokenizer import train_tokenizer
from tristill.stages.errors import CheckpointError, CorpusError, TokenizerError
from tristill.stages.models.checkpoint import save_model
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.generate import Sampling, generate, load_causal_model
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.config import QuantizeConfig

SHAPE = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 48}
CONTEXT = 24


def save_author(folder: Path, quantize: QuantizeConfig | None = None, seed: int = 0) -> Path:
    """A model that knows nothing, with a tokenizer, in a folder of ours."""
    folder.mkdir(parents=True)
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(TrainedTokenizer(vocab_size=300), [text])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = Transformer(ModelConfig.model_validate(SHAPE), tokenizer.get_vocab_size(), quantize)
    model.initialize(torch.Generator().manual_seed(seed))
    end_of_text_id = tokenizer.token_to_id("<|endoftext|>")
    save_model(folder, model, folder / "tokenizer.json", context_length=CONTEXT, end_of_text_id=end_of_text_id)
    return folder


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_author(tmp_path_factory.mktemp("author") / "teacher")


def source_of(model: Path, **changes: object) -> SyntheticText:
    settings = {"kind": "synthetic", "model": str(model), "documents": 20, "max_tokens": 16, "batch_documents": 6}
    return SyntheticText.model_validate(settings | changes)


def content(parts: list[Path]) -> list[bytes]:
    return [part.read_bytes() for part in parts]


@pytest.mark.parametrize("quantize", [None, QuantizeConfig()], ids=["teacher", "ternary student"])
def test_a_model_writes_a_corpus_that_becomes_tokens(tmp_path: Path, quantize: QuantizeConfig | None) -> None:
    source = source_of(save_author(tmp_path / "model", quantize))
    tokenizer = {"kind": "file", "path": str(source.model)}
    config = DataConfig(source=source, tokenizer=tokenizer, context_length=8, validation_fraction=0.3)
    described = tokenize_corpus(config, tmp_path / "data")
    parts = sorted((tmp_path / "data" / "synthetic").glob("part-*.jsonl"))
    assert [len(part.read_text().splitlines()) for part in parts] == [6, 6, 6, 2]
    texts = list(written_documents(parts))
    assert sum(counts.documents for counts in described.splits.values()) == len(texts) <= 20
    assert len(set(texts)) > 15
    again = tokenize_corpus(config, tmp_path / "data")
    assert again == described


def test_documents_begin_with_their_prompts_in_turn(author: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon\n\n  the \ncaf\u00e9 \U0001f98a\r", encoding="utf-8")
    texts = list(
        written_documents(write_synthetic(source_of(author, prompts=str(prompts), max_tokens=4), tmp_path / "out"))
    )
    for number, text in enumerate(texts):
        assert text.startswith(["Once upon", "  the ", "caf\u00e9 \U0001f98a"][number % 3])
    assert len(set(texts)) > 10


def test_parts_are_a_function_of_settings_and_number(author: Path, tmp_path: Path) -> None:
    whole = content(parts := write_synthetic(source_of(author), tmp_path / "a"))
    parts[1].unlink()
    parts[2].write_bytes(parts[2].read_bytes()[:-30])  # not by us: ours are renamed when they are whole
    untouched = parts[0].stat().st_mtime_ns
    assert content(write_synthetic(source_of(author), tmp_path / "a")) == whole
    assert parts[0].stat().st_mtime_ns == untouched
    fewer = write_synthetic(source_of(author, documents=12), tmp_path / "b")
    assert content(fewer) == whole[:2]
    assert content(write_synthetic(source_of(author, seed=1), tmp_path / "c"))[0] != whole[0]


def test_parts_of_other_settings_or_models_are_never_mixed_in(author: Path, tmp_path: Path) -> None:
    whole = content(write_synthetic(source_of(author), tmp_path / "out"))
    other = save_author(tmp_path / "other", seed=1)
    for source in (source_of(author, temperature=0.9), source_of(other)):
        with pytest.raises(CorpusError, match=r"out: holds documents written with other settings, or by another model"):
            write_synthetic(source, tmp_path / "out")
    moved = (tmp_path / "other").rename(tmp_path / "moved")
    save_author(tmp_path / "moved" / "same")
    assert content(write_synthetic(source_of(moved / "same"), tmp_path / "out")) == whole, "the same model elsewhere"


def test_settings_may_change_as_long_as_nothing_is_written(author: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="in all, the context length"):
        write_synthetic(source_of(author, max_tokens=CONTEXT + 1), tmp_path / "out")
    assert len(write_synthetic(source_of(author, max_tokens=CONTEXT), tmp_path / "out")) == 4


def test_another_model_or_other_prompts_change_the_signature(author: Path, tmp_path: Path) -> None:
    model = save_author(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a")
    source = source_of(model, prompts=str(prompts))
    signatures = [corpus_signature(source)]
    for path in (prompts, model / "model.safetensors", model / "tokenizer.json", model / "config.json"):
        path.write_bytes(path.read_bytes() + b" ")
        corpus_signature.__globals__["_files_signature"].cache_clear()
        signatures.append(corpus_signature(source))
    assert len(set(signatures)) == 5
    assert None not in signatures
    assert corpus_signature(source_of(tmp_path / "nowhere")) is None


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        (None, {"max_tokens": 25}, r"from nothing: found 25 tokens, expected at most 24 in all, .*lower data\.source"),
        (
            b"the\nxyz xyz",
            {"max_tokens": 20},
            r"txt, line 2: found \d+ of prompt and max_tokens = 20 tokens, .*or shorten",
        ),
        (b"\n \n", {}, r"prompts\.txt: found no prompt in it; give one per line, or leave data\.source\.prompts out"),
        (b"\xff\xfe", {}, r"prompts\.txt: is not UTF-8 text"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(
    author: Path, tmp_path: Path, prompts: bytes | None, changes: dict[str, object], message: str
) -> None:
    if prompts is not None:
        (tmp_path / "prompts.txt").write_bytes(prompts)
        changes = {**changes, "prompts": str(tmp_path / "prompts.txt")}
    with pytest.raises(CorpusError, match=message):
        write_synthetic(source_of(author, **changes), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_models_that_are_not_there_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"nowhere/config\.json: found no file there; data\.source\.model is a folder"
    ):
        write_synthetic(source_of(tmp_path / "nowhere"), tmp_path / "out")
    model = save_author(tmp_path / "model")
    with pytest.raises(CorpusError, match=r"none\.txt: found no file there; .*data\.source\.prompts a file"):
        write_synthetic(source_of(model, prompts=str(tmp_path / "none.txt")), tmp_path / "out")
    wider = json.loads((model / "tokenizer.json").read_text())
    wider["model"]["vocab"]["Qz"] = 70_000
    wider["model"]["merges"].append(["Q", "z"])
    (model / "tokenizer.json").write_text(json.dumps(wider))
    (tmp_path / "prompts.txt").write_text("Qz")
    with pytest.raises(CorpusError, match=r"found id 70000 \('Qz'\), expected less than 300, .*; leave that token out"):
        write_synthetic(source_of(model, prompts=str(tmp_path / "prompts.txt")), tmp_path / "out")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read"):
        write_synthetic(source_of(model), tmp_path / "out")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    with pytest.raises(CheckpointError, match=r"config\.json: does not describe a model of ours"):
        write_synthetic(source_of(model), tmp_path / "out")


def test_damaged_parts_are_refused_by_their_reader(tmp_path: Path) -> None:
    (tmp_path / "part-00000.jsonl").write_text('{"text": "fine"}\n{"txt": ""}\n')
    with pytest.raises(
        CorpusError, match=r"part-00000\.jsonl: cannot be read as JSON lines .* run `tristill tokenize`"
    ):
        list(written_documents([tmp_path / "part-00000.jsonl"]))


def save_hugging_face(folder: Path, author: Path, family: str = "llama", **changes: object) -> Path:
    """A tiny random model of transformers, signed by its own `save_pretrained`."""
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    vocab = Tokenizer.from_file(str(author / "tokenizer.json"))
    ids = {"eos_token_id": vocab.token_to_id("<|endoftext|>"), "bos_token_id": None, **changes}
    shapes = {
        "llama": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
        },
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(family, vocab_size=vocab.get_vocab_size(), **shapes[family], **ids)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocab.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_of_transformers_writes_too(author: Path, tmp_path: Path, family: str) -> None:
    folder = save_hugging_face(tmp_path / "model", author, family)
    (tmp_path / "prompts.txt").write_text("the student\nthe")
    source = source_of(folder, prompts=str(tmp_path / "prompts.txt"), max_tokens=8)
    texts = list(written_documents(parts := write_synthetic(source, tmp_path / "a")))
    assert len(texts) == 20
    assert all(text.startswith("the") for text in texts)
    assert content(write_synthetic(source, tmp_path / "b")) == content(parts)
    with pytest.raises(CorpusError, match=r"expected at most 24 in all"):
        write_synthetic(source_of(folder, max_tokens=25), tmp_path / "c")


def test_transformers_and_our_own_code_write_the_same(author: Path, tmp_path: Path) -> None:
    """One set of weights, read by both: signed as transformers does, its folder is theirs."""
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in author.iterdir():
        (theirs / path.name).write_bytes(path.read_bytes())
    config = json.loads((author / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    ours_and_theirs = [load_causal_model(folder, torch.device("cpu")) for folder in (author, theirs)]
    assert ours_and_theirs[0].rollout.func is not ours_and_theirs[1].rollout.func  # type: ignore[attr-defined]
    start = ours_and_theirs[0].start_id
    uniform = torch.rand(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompts = [[start], [start, 5, 9], [start, 7], [start, 20, 21, 22]]
    found = [generate(model, prompts, Sampling(0.8, 0.9, 12), uniform) for model in ours_and_theirs]
    assert found[0] == found[1]


def test_folders_that_transformers_cannot_use_are_refused(author: Path, tmp_path: Path) -> None:
    mamba = save_hugging_face(tmp_path / "mamba", author, "mamba")
    with pytest.raises(CheckpointError, match=r"found a mamba, which keeps no keys and values; expected a decoder"):
        write_synthetic(source_of(mamba), tmp_path / "out")
    endless = save_hugging_face(tmp_path / "endless", author, eos_token_id=None)
    with pytest.raises(CheckpointError, match=r"found no eos_token_id, so no text would end; set it"):
        write_synthetic(source_of(endless), tmp_path / "out")
    (endless / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(
        CheckpointError, match=r"endless: transformers cannot load it as a causal language model \(Value"
    ):
        write_synthetic(source_of(endless), tmp_path / "out")


def test_without_transformers_the_extra_is_named(author: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_hugging_face(tmp_path / "model", author)
    monkeypatch.setitem(sys.modules, "transformers", None)  # what Python itself does with what cannot be imported
    with pytest.raises(CheckpointError, match=r"transformers, which may know it, is not installed; run `pip install"):
        write_synthetic(source_of(folder), tmp_path / "out")
