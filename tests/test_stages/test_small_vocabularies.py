"""Vocabularies of fewer ids than a head has entries: letters of DNA, bits. Every profile serves every loss it names."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tristill.cache import open_cache
from tristill.stages.data.config import DataConfig
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.distill.config import DistillConfig, StudentConfig
from tristill.stages.distill.distill import distill
from tristill.stages.dump.config import DumpConfig
from tristill.stages.dump.dump import dump_logits
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.models.checkpoint import save_model
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.transformer import Transformer
from tristill.stages.targets.cached import CachedSource

CPU = torch.device("cpu")
SHAPE = ModelConfig(width=16, layers=1, heads=2, mlp_width=32)
TERMS = [
    {"kind": "cross_entropy"}, {"kind": "forward_kl"}, {"kind": "reverse_kl"}, {"kind": "jensen_shannon"},
    {"kind": "ranking"}, {"kind": "top1_hinge"}, {"kind": "total_variation"},
]  # fmt: skip
PROFILES = {
    "topk": {"kind": "topk"},
    "transform": {"kind": "transform"},
    "sampled": {"kind": "sampled"},
    "dense": {"kind": "dense"},
    "plain_topk": {"kind": "plain_topk", "top_k": 32},
}


def letters_of(folder: Path, vocab_size: int) -> DataConfig:
    letters = "ACGTNXYZUVWPQRSBDEFHIJKLM"[: vocab_size - 1]
    vocab = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel({**vocab, "<eos>": vocab_size - 1}, unk_token=letters[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    draws = random.Random(0)
    texts = ("".join(draws.choices(letters, k=30 + number)) for number in range(40))
    (folder / "text.txt").write_text("\n".join(texts))
    return DataConfig.model_validate(
        {
            "source": {"kind": "text", "paths": [str(folder / "text.txt")], "documents": "line"},
            "tokenizer": {"kind": "file", "path": str(folder / "tokenizer.json"), "end_of_text": "<eos>"},
            "context_length": 8,
            "validation_fraction": 0.3,
        }
    )


@pytest.mark.parametrize("vocab_size", [2, 6])
def test_a_student_of_a_vocabulary_smaller_than_a_head(tmp_path: Path, vocab_size: int) -> None:
    corpus = tokenize_corpus(letters_of(tmp_path, vocab_size), tmp_path / "data")
    assert corpus.vocab_size == vocab_size
    teacher = Transformer(SHAPE, vocab_size)
    teacher.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        teacher.get_parameter("model.embed_tokens.weight").mul_(30)
    save_model(tmp_path / "teacher", teacher, tmp_path / "data" / "tokenizer.json", 8, corpus.end_of_text_id)
    divergences = {}
    for name, profile in PROFILES.items():
        dump = DumpConfig.model_validate({"profile": profile, "calibration_windows": 4, "max_train_windows": 64})
        dump_logits(dump, tmp_path / "data", tmp_path / "teacher", tmp_path / name)
        terms = TERMS[:2] if name == "sampled" else TERMS
        training = {"steps": 1, "batch_windows": 2, "learning_rate": 1e-9}
        config = DistillConfig.model_validate(
            {"losses": [{"weight": 1.0, **term} for term in terms], "training": training}
        )
        source = CachedSource(open_cache(tmp_path / name), CPU)
        student = StudentConfig(model=SHAPE)
        folder = tmp_path / "students" / name
        found = distill(config, student, SHAPE, source, CPU, folder, tmp_path, EvaluateConfig(), {}).validation
        divergences[name] = found.kl_to_teacher_nats
        assert (found.top1_agreement is None) == (found.acceptance_rate is None) == (name == "sampled")
    kept = open_cache(tmp_path / "topk").spec.profile
    assert kept.head.max_entries == vocab_size  # type: ignore[union-attr]
    exact = divergences.pop("dense")
    del divergences["sampled"]
    assert all(value == pytest.approx(exact, rel=0.05, abs=2e-3) for value in divergences.values()), divergences
