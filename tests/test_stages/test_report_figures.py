"""What the report computes itself, against the slow and obvious way."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import CPU, SHAPE, dump_config, make_run

from tristill.cache import Cache, open_cache
from tristill.stages.data.frequencies import token_counts
from tristill.stages.data.tokenized import load_corpus, split_windows
from tristill.stages.data.tokenizer import load_tokenizer
from tristill.stages.dump.dump import dump_logits
from tristill.stages.errors import CorpusError
from tristill.stages.fidelity.partition import log_partition
from tristill.stages.generate.text import continuations, generate_text
from tristill.stages.models.checkpoint import load_model, save_model
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.config import QuantizeConfig

ASKED = (0.5, 1.0, 2.0, 3.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def cache_of(run: Path, folder: Path, profile: dict[str, object]) -> Cache:
    dump_logits(dump_config(profile=profile, hidden_layers=[]), run / "data", run / "teacher", folder)
    return open_cache(folder)


def teacher_logits(run: Path, positions: int) -> np.ndarray:
    """Of the first held-out positions, float64, from the teacher itself."""
    windows = split_windows(run / "data", "validation")
    teacher = load_model(run / "teacher").eval()
    ids = torch.from_numpy(windows.read(list(range(windows.num_windows)))).long()[:, :-1]
    with torch.no_grad():
        logits = teacher(ids).final_BTD @ teacher.head_weight.T
    return logits.flatten(0, 1)[:positions].double().numpy()


@pytest.mark.parametrize(
    ("profile", "known", "tolerance"),
    [
        ({"kind": "dense"}, ASKED, 0.03),
        ({"kind": "topk", "temperatures": [1.0, 2.0]}, (1.0, 2.0), 0.04),
        ({"kind": "plain_topk", "top_k": 5, "logit_dtype": "float32"}, (1.0,), 1e-3),
        ({"kind": "plain_topk", "top_k": 270, "logit_dtype": "float32"}, ASKED, 1e-3),
        ({"kind": "transform", "step": 0.1, "temperatures": [1.0, 2.0]}, ASKED, 0.05),
    ],
)
def test_the_log_partition_curve_is_that_of_the_teacher(
    run: Path, tmp_path: Path, profile: dict[str, object], known: tuple[float, ...], tolerance: float
) -> None:
    curve = log_partition(cache_of(run, tmp_path / "cache", profile), ASKED)
    assert curve is not None
    assert curve.split == "validation"
    logits_NV = teacher_logits(run, curve.positions)
    assert len(logits_NV) == curve.positions > 100
    assert tuple(point.temperature for point in curve.points) == known
    for point in curve.points:
        tau = point.temperature
        nats = np.log(np.exp((logits_NV - logits_NV.max(axis=1, keepdims=True)) / tau).sum(axis=1))
        assert point.mean_nats == pytest.approx(nats.mean(), abs=tolerance)
        assert point.low_nats == pytest.approx(np.quantile(nats, 0.1), abs=2 * tolerance)
        assert point.high_nats == pytest.approx(np.quantile(nats, 0.9), abs=2 * tolerance)


def test_the_mass_of_the_head_is_the_teachers(run: Path, tmp_path: Path) -> None:
    profile = {"kind": "plain_topk", "top_k": 5, "logit_dtype": "float32"}
    curve = log_partition(cache_of(run, tmp_path / "cache", profile), ASKED)
    assert curve is not None
    logits_NV = teacher_logits(run, curve.positions)
    p_NV = np.exp(logits_NV) / np.exp(logits_NV).sum(axis=1, keepdims=True)
    assert curve.points[0].head_mass == pytest.approx(np.sort(p_NV, axis=1)[:, -5:].sum(axis=1).mean(), abs=1e-4)
    dense = log_partition(cache_of(run, tmp_path / "dense", {"kind": "dense"}), (1.0,))
    assert dense is not None
    assert dense.points[0].head_mass is None


def test_draws_know_no_partition_function(run: Path, tmp_path: Path) -> None:
    assert log_partition(cache_of(run, tmp_path / "cache", {"kind": "sampled", "draws": 8}), ASKED) is None


def test_tokens_are_counted_from_the_most_frequent_down(run: Path) -> None:
    tokens = np.load(run / "data" / "train.npy")
    assert token_counts(run / "data") == sorted(Counter(tokens.tolist()).values(), reverse=True)
    assert token_counts(run / "data", 100) == sorted(Counter(tokens[:100].tolist()).values(), reverse=True)


def test_token_files_that_are_gone_are_an_error_that_names_them(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes((run / "data" / "data.json").read_bytes())
    with pytest.raises(CorpusError, match=r"train\.npy: cannot be read as token ids"):
        token_counts(tmp_path)


def test_models_go_on_from_held_out_text_as_generate_does(run: Path, tmp_path: Path) -> None:
    corpus = load_corpus(run / "data")
    student = Transformer(SHAPE, corpus.vocab_size, QuantizeConfig())
    save_model(tmp_path, student.to(CPU), run / "data" / "tokenizer.json", 12, corpus.end_of_text_id)
    for folder in (run / "teacher", tmp_path):
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        texts = ["alpha of", "beta"]
        prompts = [tokenizer.encode(text).ids for text in texts]
        settings = {"max_tokens": 5, "temperature": 0.0, "top_p": 1.0, "seed": 0}
        found = continuations(folder, prompts, **settings)
        for text, added in zip(texts, found, strict=True):
            assert text + added == "".join(generate_text(folder, text, **settings))
