"""A chat corpus through both stages: positions that do not count have no part in any loss, metric or byte."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chats import chat_settings, make_tokenizer, some_chats, write_json_lines
from small_training import CPU, SHAPE, distill_config, dump_config, make_teacher, student_from, student_of

from tristill.cache import SampledProfile, SplitName, open_cache
from tristill.stages.data.config import DataConfig
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.data.tokenized import load_corpus, split_windows
from tristill.stages.data.tokens import TokenWindows
from tristill.stages.distill.objective import Objective
from tristill.stages.dump.dump import dump_logits
from tristill.stages.dump.extract import target_arrays
from tristill.stages.dump.forward import forward_windows
from tristill.stages.errors import CheckpointError, CorpusError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.evaluate.evaluate import evaluate, glance
from tristill.stages.losses.chunked_head import chunked_head_loss
from tristill.stages.losses.cross_entropy import CrossEntropy
from tristill.stages.losses.hidden import HiddenLoss
from tristill.stages.losses.hidden_config import HiddenLossConfig, RelationsConfig
from tristill.stages.losses.relations import RelationLoss, Widths
from tristill.stages.losses.term import WeightedTerm
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.transformer import State, Transformer
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.online import OnlineSource
from tristill.stages.targets.source import Epoch, Signals, TargetBatch, endless_batches
from tristill.stages.teacher.config import TeacherConfig
from tristill.stages.teacher.train import train_teacher
from tristill.stages.training.loop import StepInfo

pytest.importorskip("transformers", reason="the extra `hf` is not installed")


class UnpluggedSource(CachedSource):
    """Fails after seven training batches, as a machine might; checkpoints are at steps 5 and 10."""

    def batches(self, split: SplitName, batch_windows: int, signals: Signals, epoch: Epoch) -> Iterator[TargetBatch]:
        for number, batch in enumerate(super().batches(split, batch_windows, signals, epoch)):
            if number == 7:
                raise RuntimeError("pulled the plug")
            yield batch


PROFILES: dict[str, dict[str, Any]] = {
    "sampled": {"kind": "sampled", "draws": 20},
    "topk": {"kind": "topk", "temperatures": [1.0, 2.0]},
    "transform": {"kind": "transform", "step": 0.1, "temperatures": [1.0, 2.0]},
    "dense": {"kind": "dense"},
    "plain_topk": {"kind": "plain_topk", "top_k": 5},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of which about a fifth counts, with windows of which nothing does."""
    folder = tmp_path_factory.mktemp("chats")
    path = write_json_lines(folder / "rows.jsonl", [{"messages": chat} for chat in some_chats(220)])
    settings = chat_settings(path, make_tokenizer(folder / "tokenizer"), context_length=12)
    tokenize_corpus(DataConfig.model_validate(settings), folder / "data")
    make_teacher(folder, "teacher", SHAPE, steps=30)
    windows = split_windows(folder / "data", "train")
    counts = windows.counts()
    assert 0.1 < counts.mean() / 12 < 0.35
    assert 0 < (counts == 0).sum() < len(counts)
    return folder


def test_the_teacher_is_evaluated_where_positions_count(run: Path) -> None:
    """By hand: the mean over all labels that the mask names, and the bytes of what the assistant says."""
    summary = json.loads((run / "teacher" / "summary.json").read_text())["validation"]
    teacher, windows = load_model(run / "teacher"), split_windows(run / "data", "validation")
    ids = torch.from_numpy(windows.read(range(windows.num_windows)).astype(np.int64))  # type: ignore[arg-type]
    mask = torch.from_numpy(windows.mask(range(windows.num_windows)))  # type: ignore[arg-type]
    with torch.no_grad():
        logits = teacher(ids[:, :-1]).final_BTD @ teacher.head_weight.T
    losses = torch.nn.functional.cross_entropy(logits[mask].double(), ids[:, 1:][mask], reduction="none")
    assert summary["positions"] == mask.sum()
    assert summary["loss_nats"] == pytest.approx(float(losses.mean()), rel=1e-5)
    per_token = load_corpus(run / "data").splits["validation"].bytes_per_token
    assert summary["bits_per_byte"] == pytest.approx(float(losses.mean()) / np.log(2) / per_token, rel=1e-5)


def test_a_glance_takes_windows_until_a_position_counts(run: Path, tmp_path: Path) -> None:
    teacher, source = load_model(run / "teacher"), OnlineSource(run / "data", CPU)
    counts = split_windows(run / "data", "validation").counts()
    first = int(np.flatnonzero(counts)[0])
    assert first > 0
    found = glance(teacher, source, EvaluateConfig(batch_windows=1), 1)
    assert found.positions == counts[first]
    assert glance(teacher, source, EvaluateConfig(batch_windows=1), first + 1) == found
    enough = 2 * (first // 2 + 5)
    assert glance(teacher, source, EvaluateConfig(batch_windows=2), enough).positions == counts[:enough].sum()
    assert counts[:enough].sum() > found.positions
    shutil.copytree(run / "data", tmp_path / "data")
    np.save(tmp_path / "data" / "validation-mask.npy", np.zeros_like(np.load(run / "data" / "validation-mask.npy")))
    with pytest.raises(CorpusError, match="the validation split: found no position that counts"):
        evaluate(teacher, OnlineSource(tmp_path / "data", CPU), EvaluateConfig(), "")


def test_the_teacher_is_trained_where_positions_count(run: Path, tmp_path: Path) -> None:
    """Its first loss is that of the untrained model at the labels that the mask names."""
    source = OnlineSource(run / "data", CPU)
    first_batch = {seed: next(endless_batches(source, 8, Signals(), seed)(0)) for seed in range(9)}
    seed, batch = next((seed, found) for seed, found in first_batch.items() if found.counts_BT.any())  # type: ignore[union-attr]
    model = Transformer(SHAPE, source.vocab_size)
    model.initialize(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model(batch.input_ids_BT).final_BTD @ model.head_weight.T
    expected = torch.nn.functional.cross_entropy(logits[batch.counts_BT], batch.labels_BT[batch.counts_BT])
    training = {"steps": 1, "learning_rate": 1e-2, "batch_windows": 8, "seed": seed}
    settings = TeacherConfig.model_validate({"model": SHAPE.model_dump(), "training": training})
    train_teacher(settings, run / "data", tmp_path / "teacher", EvaluateConfig())
    first = json.loads((tmp_path / "teacher" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_draws_are_those_of_their_places_whatever_else_counts(run: Path) -> None:
    teacher, masked = load_model(run / "teacher").eval(), split_windows(run / "data", "train")
    every = TokenWindows(run / "data" / "train.npy", masked.context_length)
    profile, rows = SampledProfile(draws=20), list(range(40))
    found = [
        target_arrays(profile, {}, forward_windows(teacher, windows, "train", rows, "float32")[0])
        for windows in (masked, every)
    ]
    mask = masked.mask(rows)
    assert mask is not None
    for name, array in found[0].items():
        np.testing.assert_array_equal(array[mask], found[1][name][mask])
        assert not array[~mask].any()


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_every_profile_is_dumped_where_positions_count(run: Path, tmp_path: Path, profile: str) -> None:
    """The same for one forward pass of all windows as for batches; and calibrated on positions that count alone."""
    dump = dump_config(profile=PROFILES[profile], hidden_layers=[1, 2], hidden={"stride": 2}, calibration_windows=64)
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert cache.spec.format_version == 3
    windows = split_windows(run / "data", "train")
    num_windows = cache.num_windows("train")
    assert cache.spec.num_positions("train") == windows.counts()[:num_windows].sum()
    (batch,) = cache.stream("train", num_windows, seed=None, hidden_layers=(1, 2))
    mask = windows.mask(list(range(num_windows)))
    assert mask is not None and batch.mask is not None  # noqa: PT018
    np.testing.assert_array_equal(batch.mask, mask)
    np.testing.assert_array_equal(batch.input_ids, windows.read(list(range(num_windows))))
    source, teacher = CachedSource(cache, CPU), load_model(run / "teacher")
    metrics = evaluate(teacher, source, EvaluateConfig(), "")
    own = json.loads((run / "teacher" / "summary.json").read_text())["validation"]
    assert metrics.loss_nats == pytest.approx(own["loss_nats"], rel=1e-6)
    assert metrics.kl_to_teacher_nats == pytest.approx(0, abs=0.02 if profile != "sampled" else 1.0)
    if profile != "sampled":
        assert metrics.top1_agreement == pytest.approx(1, abs=0.02)
    for found in source.batches("train", 50, Signals(states=(State("residual", 1), State("residual", 2))), Epoch()):
        with torch.no_grad():
            features = teacher(found.input_ids_BT, found.hidden)
        assert found.counts_BT is not None
        kept = found.counts_BT[:, ::2]
        for state, states in found.hidden.items():
            expected = features.hidden[state][:, ::2]
            torch.testing.assert_close(states[kept], expected[kept], rtol=2e-3, atol=1e-2)
    cache.close()


def test_a_resumed_dump_has_the_bytes_of_one_that_was_not_interrupted(run: Path, tmp_path: Path) -> None:
    dump = dump_config(profile=PROFILES["transform"], hidden_layers=[2], calibration_windows=64, shard_positions=2048)
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(whole) > 4
    other = tmp_path / "other"
    dump_logits(dump, run / "data", run / "teacher", other)
    for name in ("train-00001.h5", "cache.json"):
        (other / name).unlink()
    dump_logits(dump, run / "data", run / "teacher", other)
    assert whole == {path.name: path.read_bytes() for path in other.iterdir()}


CONFIGS: dict[str, dict[str, Any]] = {
    "labels and teacher": {"alpha": 0.3, "temperature": 2.0},
    "mining": {"alpha": 0.3, "mining": {"fraction": 0.5, "by": "divergence"}},
    "hidden": {"alpha": 0.5, "hidden": {"weight": 0.5, "kind": "cosine", "layers": {"1": 1, "2": 2}}},
    "entropy weights": {"alpha": 0.5, "entropy_weights": {"power": 1.0}},
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_cached_at_full_fidelity_and_online_give_one_loss_trace(run: Path, tmp_path: Path, name: str) -> None:
    vocab_size = load_corpus(run / "data").vocab_size
    dump = dump_config(
        profile={"kind": "plain_topk", "top_k": vocab_size, "logit_dtype": "float32"}, hidden_layers=[1, 2]
    )
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "cache")
    traces = {}
    for targets in ("cached", "online"):
        config = distill_config(targets=targets, **CONFIGS[name])
        summary, log = student_of(run, tmp_path / "cache", tmp_path / targets, config, dump)
        assert summary.targets == targets
        traces[targets] = log
        traces[f"{targets} validation"] = [summary.validation.model_dump(exclude={"calibration", "standard_errors"})]
    for cached, online in zip(traces["cached"], traces["online"], strict=True):
        for key in ("loss", "terms", "grad_norm"):
            assert cached[key] == pytest.approx(online[key], rel=1e-2 if "hidden" in CONFIGS[name] else 3e-4), key
    assert traces["cached validation"][0] == pytest.approx(traces["online validation"][0], rel=5e-3, abs=1e-4)


def test_relations_from_the_cache_are_those_of_online_states(run: Path, tmp_path: Path) -> None:
    dump = dump_config(hidden_layers=[2], hidden={"output": "qkv"})
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "cache")
    losses = []
    for targets in ("cached", "online"):
        config = distill_config(targets=targets, alpha=1.0, relations={"weight": 1.0, "heads": 4, "layers": {"2": 2}})
        _, log = student_of(run, tmp_path / "cache", tmp_path / targets, config, dump)
        losses.append([record["terms"]["relations"] for record in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert sum(losses[0]) > 1e-5


def test_what_stands_where_nothing_counts_changes_no_loss_and_no_gradient(run: Path) -> None:
    """Labels, targets and states at masked positions replaced by others; inputs, which are context, stay."""
    source = OnlineSource(run / "data", CPU, teacher=load_model(run / "teacher"))
    config = distill_config(
        alpha=0.5,
        hidden={"weight": 0.5, "layers": {"1": 1}},
        relations={"weight": 0.1, "heads": 4, "layers": {"2": 2}},
        entropy_weights={"power": 1.0},
    )
    student = Transformer(SHAPE, source.vocab_size)
    student.initialize(torch.Generator().manual_seed(1))
    objective = Objective(student, config, source)
    batch = next(source.batches("train", 16, objective.signals, Epoch()))
    counts = batch.counts_BT
    assert counts is not None
    assert batch.entropy_BT is not None
    garbled = replace(
        batch,
        labels_BT=torch.where(counts, batch.labels_BT, 7),
        hidden={state: torch.where(counts[..., None], states, 1e6) for state, states in batch.hidden.items()},
        entropy_BT=torch.where(counts, batch.entropy_BT, torch.arange(16 * 12.0).view(16, 12)),
    )
    found = []
    for one in (batch, garbled):
        objective.zero_grad()
        values = objective(one, StepInfo(0, is_logged=True))
        values.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])
        found.append((values.terms, values.telemetry["gradient_share"], gradient))
    assert found[0][:2] == found[1][:2]
    assert set(found[0][0]) == {"cross_entropy", "forward_kl", "hidden_mse", "relations"}
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("kind", ["mse", "cosine", "l2"])
def test_means_over_positions_that_count_are_those_of_a_batch_of_them_alone(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.rand(3, 8, generator=generator) < 0.4
    student, teacher = (torch.randn(3, 8, 4, generator=generator) for _ in range(2))
    config = HiddenLossConfig.model_validate({"weight": 1.0, "kind": kind, "layers": {"1": 1}})
    loss, state = HiddenLoss(config, {1: 1}, 4, 4), State("residual", 1)
    found = loss({state: student}, {state: teacher}, 1, counts)
    alone = loss({state: student[counts][None]}, {state: teacher[counts][None]})
    torch.testing.assert_close(found, alone)
    assert not torch.allclose(found, loss({state: student}, {state: teacher}))


def test_relations_under_a_mask_are_those_of_the_window_without_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 9, 12, generator=generator) for _ in range(2))
    counts = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1]], dtype=torch.bool)
    config = RelationsConfig.model_validate({"weight": 1.0, "heads": 2, "layers": {"1": 1}})
    loss, state = RelationLoss(config, {1: 1}, Widths(4, 4), Widths(4, 4)), State("qkv", 1)
    found = loss({state: student}, {state: teacher}, 1, counts)
    alone = loss({state: student[:, counts[0]]}, {state: teacher[:, counts[0]]})
    torch.testing.assert_close(found, alone)


def test_a_batch_of_which_nothing_counts_has_zero_loss_and_no_gradient(run: Path) -> None:
    source = OnlineSource(run / "data", CPU, teacher=load_model(run / "teacher"))
    config = distill_config(
        alpha=0.5,
        mining={"fraction": 0.5},
        entropy_weights={"power": 1.0},
        hidden={"weight": 0.5, "layers": {"1": 1}},
        relations={"weight": 0.1, "heads": 4, "layers": {"2": 2}},
    )
    student = Transformer(SHAPE, source.vocab_size)
    student.initialize(torch.Generator().manual_seed(1))
    objective = Objective(student, config, source)
    empty = int(np.flatnonzero(split_windows(run / "data", "train").counts() == 0)[0])
    ids = torch.from_numpy(split_windows(run / "data", "train").read([empty]).astype(np.int64))
    nothing = torch.zeros(1, 12, dtype=torch.bool)
    batch = TargetBatch(ids[:, :-1], ids[:, 1:], None, {}, counts_BT=nothing)
    values = objective(source.with_teacher(batch, objective.signals), StepInfo(0, is_logged=True))
    values.total.backward()
    assert float(values.total.detach()) == 0
    assert all(float(value) == 0 for value in values.terms.values())
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters())
    assert all(np.isfinite(list(found.values())).all() for found in values.telemetry.values())
    loss = chunked_head_loss(
        torch.zeros(0, 4, requires_grad=True),
        torch.ones(9, 4),
        torch.zeros(0).long(),
        None,
        [WeightedTerm(1.0, CrossEntropy())],
    )
    assert float(loss.total.detach()) == 0


def test_a_student_resumed_on_masked_windows_is_the_uninterrupted_one(run: Path, tmp_path: Path) -> None:
    dump = dump_config(profile=PROFILES["transform"], hidden_layers=[], calibration_windows=64)
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "cache")
    config = distill_config(targets="cached", alpha=0.5, curriculum={"by": "entropy", "start": 0.5})
    student_of(run, tmp_path / "cache", tmp_path / "whole", config, dump)
    source = UnpluggedSource(open_cache(tmp_path / "cache"), CPU)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        student_from(source, run, tmp_path / "cut", config)
    student_of(run, tmp_path / "cache", tmp_path / "cut", config, dump)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_windows_in_which_the_assistant_says_nothing_are_no_dump(run: Path, tmp_path: Path) -> None:
    counts = split_windows(run / "data", "train").counts()
    assert counts[0] == 0, "the first window is what a system and a user say"
    with pytest.raises(CheckpointError, match=r"cache\.max_train_windows: in the first 1 windows of split train"):
        dump_logits(dump_config(max_train_windows=1), run / "data", run / "teacher", tmp_path / "cache")


def test_a_mixture_of_one_teacher_with_itself_is_that_teacher(run: Path, tmp_path: Path) -> None:
    """Mixed as caches are read, and when they are dumped."""
    dump = dump_config(profile=PROFILES["dense"], hidden_layers=[])
    beside = dump_config(profile={"kind": "plain_topk", "top_k": 40}, hidden_layers=[])
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "own")
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "other")
    traces = []
    for name, caches in (("alone", ()), ("mixed", [{"dir": str(tmp_path / "other"), "weight": 1.0}])):
        one = distill_config(targets="cached", alpha=0.0, caches=caches)
        _, log = student_of(run, tmp_path / "own", tmp_path / name, one, dump)
        traces.append([record["loss"] for record in log])
    assert traces[0] == pytest.approx(traces[1], rel=1e-4)
    members = [{"path": str(run / "teacher"), "weight": 1.0}]
    for name, changes in (("one", {}), ("two", {"ensemble": members})):
        dumped = beside.model_validate({**beside.model_dump(), **changes})
        dump_logits(dumped, run / "data", run / "teacher", tmp_path / name)
    found = [next(open_cache(tmp_path / name).stream("train", 300, seed=None)) for name in ("one", "two")]
    for name, array in found[0].target.items():
        if name != "head_ids":  # ties change places
            np.testing.assert_allclose(array, found[1].target[name], atol=0.02)
