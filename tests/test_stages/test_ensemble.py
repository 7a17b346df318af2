"""Several teachers: mixed before anything is kept, or as their caches are read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import CPU, SHAPE, make_run, make_teacher, places, student_from
from torch import Tensor

from conftest import TOKENIZER_JSON, make_spec, window_arrays, write_cache
from tristill.cache import CacheMismatchError, CacheMissingError, CacheWriter, SplitName, open_cache
from tristill.cache.manifest import cache_fingerprint
from tristill.stages.distill.choose import choose_source
from tristill.stages.distill.config import DistillConfig
from tristill.stages.distill.distill import StudentSummary
from tristill.stages.dump.config import DumpConfig
from tristill.stages.dump.dump import dump_logits
from tristill.stages.errors import CheckpointError, TargetsError, TokenizerError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.evaluate.evaluate import evaluate
from tristill.stages.losses.target import DrawnTarget
from tristill.stages.models.checkpoint import load_model, save_model
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.language_model import State
from tristill.stages.models.origin import model_fingerprint
from tristill.stages.models.transformer import Transformer
from tristill.stages.targets.mixed import MixedSource
from tristill.stages.targets.source import Epoch, Signals, TargetBatch

OTHER_SHAPE = ModelConfig(width=24, layers=1, heads=2, mlp_width=24)
VOCAB = 270
WHOLE = {"kind": "plain_topk", "top_k": VOCAB, "logit_dtype": "float32"}
DENSE = {"kind": "dense"}
TRANSFORM = {"kind": "transform", "step": 0.1, "temperatures": [1.0, 2.0]}
HEADS = {"kind": "topk", "temperatures": [1.0]}
DRAWS = {"kind": "sampled", "draws": 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens, a teacher, another one of another shape, and caches of both."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    make_teacher(folder, "other", OTHER_SHAPE, steps=10)
    for kind, profile in {"whole": WHOLE, "dense": DENSE, "transform": TRANSFORM, "draws": DRAWS}.items():
        dump_logits(dump_config(profile=profile), folder / "data", folder / "teacher", folder / kind)
        dump_logits(dump_config(profile=profile), folder / "data", folder / "other", folder / f"other-{kind}")
    dump_logits(dump_config(profile=HEADS), folder / "data", folder / "teacher", folder / "heads")
    dump_logits(dump_config(profile=HEADS), folder / "data", folder / "other", folder / "other-heads")
    return folder


def dump_config(**changes: object) -> DumpConfig:
    settings: dict[str, object] = {"profile": WHOLE, "max_train_windows": 200, "calibration_windows": 32}
    return DumpConfig.model_validate(settings | changes)


def mixed_dump(run: Path, weight: float = 0.5, **changes: object) -> DumpConfig:
    return dump_config(ensemble=[{"path": str(run / "other"), "weight": weight}], **changes)


def distill_config(*caches: Path, weight: float = 0.5, **changes: object) -> DistillConfig:
    training = {"steps": 10, "learning_rate": 1e-2, "batch_windows": 8, "log_every": 1}
    further = [{"dir": str(cache), "weight": weight} for cache in caches]
    return DistillConfig.model_validate({"training": training, "caches": further, "targets": "cached", **changes})


def source_of(run: Path, cache: str, config: DistillConfig) -> MixedSource:
    source = choose_source(config, dump_config(), SHAPE.layers, places(run, run / cache), CPU)
    assert isinstance(source, MixedSource) or not config.caches
    return source  # type: ignore[return-value]


@torch.no_grad()
def logits(folder: Path, input_ids_BT: Tensor) -> Tensor:
    """All logits of a model in float64, (B T, V)."""
    model = load_model(folder).double().eval()
    return model.logits(input_ids_BT).flatten(0, 1)


def mixture_of(run: Path, ids_BT: Tensor, shares: tuple[float, float], tau: float = 1.0) -> Tensor:
    """sum_k share_k softmax(z_k / tau) in float64."""
    parts = (torch.softmax(logits(run / name, ids_BT) / tau, dim=-1) for name in ("teacher", "other"))
    return sum(share * part for share, part in zip(shares, parts, strict=True))  # type: ignore[return-value]


def first_batch(
    source: MixedSource, seed: int | None = 3, split: SplitName = "train", tail: str | None = None
) -> TargetBatch:
    signals = Signals(targets=True, tail=tail)  # type: ignore[arg-type]
    return next(iter(source.batches(split, 8, signals, Epoch(seed))))


# Mixed at the dump.


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_a_dumped_mixture_is_that_of_both_softmaxes_in_float64(run: Path, tmp_path: Path, tau: float) -> None:
    config = mixed_dump(run, profile={**WHOLE, "temperature": tau}, hidden_layers=[2])
    dump_logits(config, run / "data", run / "teacher", tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    teacher = load_model(run / "teacher").eval()
    for index in (0, 17, 199):
        found = cache.window("train", index)
        ids = torch.from_numpy(found.input_ids.astype(np.int64))
        log_p_NV = mixture_of(run, ids[:, :-1], (2 / 3, 1 / 3)).log()
        expected = torch.log_softmax(log_p_NV / tau, dim=-1)
        head_ids = torch.from_numpy(found.target["head_ids"].astype(np.int64))[0]
        stored = torch.log_softmax(torch.from_numpy(found.target["head_logits"])[0].double(), dim=-1)
        torch.testing.assert_close(stored, expected.gather(-1, head_ids), rtol=1e-4, atol=2e-4)
        entropy = torch.from_numpy(found.signals["teacher_entropy"])[0].double()
        torch.testing.assert_close(entropy, -(expected * expected.exp()).sum(-1), rtol=0, atol=0.07)
        with torch.no_grad():
            own = teacher(ids[:, :-1], [State("residual", 2)]).hidden[State("residual", 2)]
        np.testing.assert_allclose(found.hidden[2], own.half().numpy(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("profile", [DRAWS, HEADS], ids=["sampled", "topk"])
def test_coded_profiles_keep_mixtures_too(run: Path, tmp_path: Path, profile: dict[str, object]) -> None:
    dump_logits(mixed_dump(run, 3.0, profile=profile), run / "data", run / "teacher", tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    found = cache.window("train", 5)
    p_NV = mixture_of(run, torch.from_numpy(found.input_ids.astype(np.int64))[:, :-1], (0.25, 0.75))
    entropy = torch.from_numpy(found.signals["teacher_entropy"])[0].double()
    torch.testing.assert_close(entropy, -(p_NV * p_NV.log()).sum(-1), rtol=0, atol=0.07)
    if profile is HEADS:
        assert (found.target["head_ids"][0, :, 0] == p_NV.argmax(-1).numpy()).all()
    assert cache.manifest.calibration is not None
    assert cache.manifest.calibration.points[0].angle_deg["1"] is not None


def test_a_teacher_mixed_with_itself_is_that_teacher(run: Path, tmp_path: Path) -> None:
    config = dump_config(ensemble=[{"path": str(run / "teacher"), "weight": 7.0}])
    dump_logits(config, run / "data", run / "teacher", tmp_path / "cache")
    alone, mixed = (open_cache(folder).window("train", 9).target for folder in (run / "whole", tmp_path / "cache"))
    order = [target["head_ids"].argsort(axis=-1) for target in (alone, mixed)]
    found = [np.take_along_axis(t["head_logits"], o, axis=-1) for t, o in zip((alone, mixed), order, strict=True)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=2e-4)


def test_the_cache_of_one_teacher_is_what_it_was_before_there_were_ensembles(run: Path, tmp_path: Path) -> None:
    config = dump_config(profile=DRAWS, own_weight=3.0)
    assert {"ensemble", "own_weight"}.isdisjoint(config.numbers())
    assert {"caches", "own_weight"}.isdisjoint(distill_config(own_weight=3.0).numbers())
    dump_logits(config, run / "data", run / "teacher", tmp_path / "cache")
    assert cache_fingerprint(tmp_path / "cache") == cache_fingerprint(run / "draws") is not None
    own = model_fingerprint(run / "teacher")
    assert open_cache(tmp_path / "cache").spec.teacher_fingerprint == own == config.teacher_fingerprint(own)


def test_the_fingerprint_of_an_ensemble_is_of_all_teachers_and_shares(run: Path, tmp_path: Path) -> None:
    plain = mixed_dump(run)
    found = plain.teacher_fingerprint("a" * 64)
    assert found not in {None, "a" * 64}
    assert found != plain.teacher_fingerprint("b" * 64)
    assert found != mixed_dump(run, 0.75).teacher_fingerprint("a" * 64)
    assert found == mixed_dump(run, 1.0, own_weight=2.0).teacher_fingerprint("a" * 64)
    assert plain.numbers() == mixed_dump(run, 1.0, own_weight=2.0).numbers()
    shutil.copytree(run / "other", tmp_path / "moved")
    moved = dump_config(ensemble=[{"path": str(tmp_path / "moved"), "weight": 0.5}])
    assert (moved.numbers(), moved.teacher_fingerprint("a" * 64)) == (plain.numbers(), found)
    (tmp_path / "moved" / "model.safetensors").unlink()
    assert moved.teacher_fingerprint("a" * 64) is None


@pytest.mark.parametrize("profile", [DENSE, TRANSFORM], ids=["dense", "transform"])
def test_profiles_of_one_hidden_state_refuse_ensembles(run: Path, profile: dict[str, object]) -> None:
    text = f"profile {profile['kind']} keeps the final hidden state of one teacher, .* use profile sampled, topk or"
    with pytest.raises(ValueError, match=text):
        mixed_dump(run, profile=profile)


def test_a_teacher_of_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "other", tmp_path / "other")
    config = dump_config(ensemble=[{"path": str(tmp_path / "other")}])
    path = tmp_path / "other" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    dump_logits(config, run / "data", run / "teacher", tmp_path / "same")  # other bytes, the same tokenizer
    content = json.loads(path.read_text())
    one, other = (text for text, number in content["model"]["vocab"].items() if number in (40, 41))
    content["model"]["vocab"] |= {one: 41, other: 40}
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError) as caught:
        dump_logits(config, run / "data", run / "teacher", tmp_path / "cache")
    for part in (f"{path}: ", "2 of ", "id 40 is", str(run / "data" / "tokenizer.json"), "mixed id by id"):
        assert part in str(caught.value)
    path.unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: is missing"):
        dump_logits(config, run / "data", run / "teacher", tmp_path / "cache")
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(CheckpointError, match="found no model there"):
        dump_logits(config, run / "data", run / "teacher", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_teacher_with_a_padded_vocabulary_is_refused(run: Path, tmp_path: Path) -> None:
    padded = Transformer(OTHER_SHAPE, VOCAB + 2)
    save_model(tmp_path / "padded", padded, run / "data" / "tokenizer.json", 12, 0)
    config = dump_config(ensemble=[{"path": str(tmp_path / "padded")}])
    with pytest.raises(CheckpointError, match=f"found {VOCAB + 2} output entries, expected {VOCAB}, .* not padded"):
        dump_logits(config, run / "data", run / "teacher", tmp_path / "cache")


def test_online_targets_refuse_an_ensemble(run: Path) -> None:
    for targets in ("online", "auto"):
        with pytest.raises(
            TargetsError, match=r"found 2 teachers, of which online targets forward the run's own alone"
        ):
            choose_source(
                distill_config(targets=targets), mixed_dump(run), SHAPE.layers, places(run, run / "nowhere"), CPU
            )


# Mixed as caches are read.


def student_of(
    run: Path, cache: str, folder: Path, config: DistillConfig
) -> tuple[StudentSummary, list[dict[str, float]]]:
    summary, log = student_from(source_of(run, cache, config), run / "nowhere", folder, config)
    return summary, [line["loss"] for line in log]


@pytest.mark.parametrize(("kind", "tau"), [("whole", 2.0), ("dense", 2.0), ("transform", 2.0), ("draws", 1.0)])
def test_caches_of_one_teacher_teach_as_one_of_them(run: Path, tmp_path: Path, kind: str, tau: float) -> None:
    changes = {"temperature": tau, "alpha": 0.25}
    alone, trace = student_of(run, kind, tmp_path / "alone", distill_config(**changes))
    config = distill_config(run / kind, run / kind, weight=0.7, **changes)
    mixed, mixed_trace = student_of(run, kind, tmp_path / "mixed", config)
    assert len(trace) == len(mixed_trace) == 10
    np.testing.assert_allclose(mixed_trace, trace, rtol=1e-3, atol=1e-4)
    assert mixed.targets == "cached"
    assert mixed.validation.kl_to_teacher_nats == pytest.approx(alone.validation.kl_to_teacher_nats, rel=1e-3)


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize(("own", "other"), [("whole", "whole"), ("dense", "dense"), ("whole", "dense")])
def test_two_teachers_are_mixed_at_the_temperature_of_the_loss(run: Path, own: str, other: str, tau: float) -> None:
    config = distill_config(run / f"other-{other}", weight=0.5, own_weight=1.5, temperature=tau)
    batch = first_batch(source_of(run, own, config))
    assert batch.targets is not None
    rows = slice(10, 60)
    target = batch.targets.chunk(rows)
    assert not isinstance(target, DrawnTarget)
    expected = mixture_of(run, batch.input_ids_BT, (0.75, 0.25), tau)[rows]
    found = target.log_probs(tau)
    assert isinstance(found, Tensor)
    exact = own == other == "whole"
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(50))
    torch.testing.assert_close(
        found.exp().double(), expected, rtol=1e-3 if exact else 0.1, atol=1e-6 if exact else 4e-3
    )
    ids, log_p = target.largest(4, tau)
    torch.testing.assert_close(log_p, found.topk(4).values)
    torch.testing.assert_close(found.gather(-1, ids), log_p)
    assert torch.equal(target.top1(), target.log_probs(1.0).argmax(-1))  # type: ignore[union-attr]


def test_heads_that_are_spread_are_mixed_and_judged_so(run: Path, tmp_path: Path) -> None:
    config = distill_config(run / "other-heads", tail="uniform")
    summary, _ = student_of(run, "heads", tmp_path / "student", config)
    assert summary.validation.kl_to_teacher_nats is not None
    source = source_of(run, "heads", config)
    batch = first_batch(source, tail="uniform")
    assert batch.targets is not None
    found = batch.targets.chunk(slice(0, 20)).log_probs(1.0)  # type: ignore[union-attr]
    alone = [
        first_batch(source_of(run, name, distill_config()), tail="uniform").targets for name in ("heads", "other-heads")
    ]
    parts = [targets.chunk(slice(0, 20)).log_probs(1.0).exp() for targets in alone]  # type: ignore[union-attr]
    torch.testing.assert_close(found.exp(), parts[0] * 2 / 3 + parts[1] / 3)


def test_held_out_metrics_are_against_the_mixture(run: Path) -> None:
    source = source_of(run, "whole", distill_config(run / "other-whole"))
    metrics = evaluate(load_model(run / "teacher"), source, EvaluateConfig(), "")
    kl, agreed, count = 0.0, 0.0, 0
    for batch in source.batches("validation", 16, Signals(), Epoch()):
        p_NV = mixture_of(run, batch.input_ids_BT, (2 / 3, 1 / 3))
        log_q_NV = torch.log_softmax(logits(run / "teacher", batch.input_ids_BT), dim=-1)
        kl += float((p_NV * (p_NV.log() - log_q_NV)).sum())
        agreed += float((p_NV.argmax(-1) == log_q_NV.argmax(-1)).sum())
        count += len(p_NV)
    assert metrics.kl_to_teacher_nats == pytest.approx(kl / count, rel=1e-3)
    assert metrics.top1_agreement == pytest.approx(agreed / count, abs=0.01)


def test_states_and_entropies_are_those_of_the_runs_own_cache(run: Path, tmp_path: Path) -> None:
    dump_logits(dump_config(hidden_layers=[1]), run / "data", run / "teacher", tmp_path / "cache")
    state = State("residual", 1)
    signals = Signals(targets=True, entropy=True, states=(state,))
    shutil.copytree(run / "other-whole", tmp_path / "other")
    alone, mixed = (
        next(iter(source_of(tmp_path, "cache", config).batches("train", 4, signals, Epoch(1))))
        for config in (distill_config(), distill_config(tmp_path / "other"))
    )
    assert torch.equal(alone.hidden[state], mixed.hidden[state])
    assert alone.entropy_BT is not None
    assert mixed.entropy_BT is not None
    assert torch.equal(alone.entropy_BT, mixed.entropy_BT)


def test_labels_alone_read_no_further_cache(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "other-whole", tmp_path / "other")
    source = source_of(run, "whole", distill_config(tmp_path / "other"))
    shutil.rmtree(tmp_path / "other")
    assert next(iter(source.batches("train", 4, Signals(), Epoch(1)))).targets is None


def test_caches_over_other_windows_are_refused_by_field(run: Path, tmp_path: Path) -> None:
    dump_logits(dump_config(max_train_windows=199), run / "data", run / "other", tmp_path / "cache")
    with pytest.raises(CacheMismatchError) as caught:
        source_of(run, "whole", distill_config(tmp_path / "cache"))
    for part in (
        f"distill.caches: {tmp_path / 'cache'}: is over other windows than the run's own cache {run / 'whole'}",
        "splits.train.fingerprint: found",
        "splits.train.num_windows: found 199, expected 200; dump both from the same data",
    ):
        assert part in str(caught.value)
    assert "validation" not in str(caught.value)
    assert "teacher" not in str(caught.value)


@pytest.mark.parametrize(
    ("own", "other", "changes", "texts"),
    [
        ("heads", "other-heads", {}, ["/heads: its targets are heads of profile topk", "/other-heads: its targets are"]),
        ("whole", "other-heads", {}, ["/other-heads: its targets are heads of profile topk, .* distill.tail = 'uniform'"]),
        ("transform", "other-transform", {"tail": "bucket"}, ["/other-transform: its targets are heads"]),
        ("whole", "other-draws", {}, ["/other-draws: found draws, but the run's own cache holds whole distributions"]),
        ("draws", "other-dense", {}, ["/other-dense: found whole distributions, but the run's own cache holds draws"]),
        ("transform", "other-dense", {"tail": "uniform"}, ["/other-dense: tail 'uniform' is asked for"]),
        ("whole", "other-heads", {"tail": "uniform", "temperature": 3.0}, ["other-heads: temperature 3 is asked for"]),
        ("whole", "other-draws", {"temperature": 2.0}, ["/other-draws: temperature 2 is asked for"]),
        ("whole", "other-heads", {"alpha": 1.0}, ["/other-heads: its targets are heads"]),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_mixed_are_refused_with_their_folder(
    run: Path, own: str, other: str, changes: dict[str, object], texts: list[str]
) -> None:
    for targets in ("cached", "auto"):
        for text in texts:
            with pytest.raises(TargetsError, match=text):
                source_of(run, own, distill_config(run / other, targets=targets, **changes))


def test_a_further_cache_that_is_not_there_is_refused(run: Path) -> None:
    with pytest.raises(CacheMissingError, match="nowhere: found no cache"):
        source_of(run, "whole", distill_config(run / "nowhere", targets="auto"))


def test_online_targets_refuse_further_caches(run: Path) -> None:
    with pytest.raises(ValueError, match=r"caches: are not read when targets = 'online', .* set targets = 'cached'"):
        distill_config(run / "whole", targets="online")


def test_a_cache_that_lies_about_its_windows_is_found_out(tmp_path: Path) -> None:
    spec = make_spec(hidden=None, profile={"kind": "plain_topk", "top_k": 300})
    own = write_cache(tmp_path / "own", spec)
    in_longer_shards = write_cache(tmp_path / "other", spec.model_copy(update={"windows_per_shard": 32}))
    source = MixedSource(own, [in_longer_shards], (0.5, 0.5), None, CPU)
    assert len(list(source.batches("train", 8, Signals(targets=True), Epoch(1)))) == 8
    writer = CacheWriter(tmp_path / "liar", spec, TOKENIZER_JSON)
    for shard in writer.missing_shards():
        arrays = window_arrays(spec, shard.split, range(shard.first_window, shard.first_window + shard.num_windows))
        shard_writer = writer.shard(shard)
        shard_writer.append({**arrays, "input_ids": arrays["input_ids"] // 2})
        shard_writer.commit()
    writer.finish()
    liar = MixedSource(own, [open_cache(tmp_path / "liar")], (0.5, 0.5), None, CPU)
    with pytest.raises(CacheMismatchError, match="liar: found other ids or masks than the run's own cache has"):
        list(liar.batches("train", 8, Signals(targets=True), Epoch(1)))
