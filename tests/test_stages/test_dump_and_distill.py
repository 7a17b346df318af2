"""From a teacher to a cache to a student: what is stored is what the teacher said, and cached equals online."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import CPU, SHAPE, distill_config, dump_config, make_run, places, student_of

from tristill.cache import CacheMismatchError, CacheWriter, HiddenSpec, PlainTopKProfile, open_cache
from tristill.stages.data.tokenized import load_corpus, split_windows
from tristill.stages.distill.choose import Places, choose_source
from tristill.stages.distill.config import StudentConfig
from tristill.stages.distill.distill import model_size
from tristill.stages.dump.config import DumpConfig
from tristill.stages.dump.dump import dump_logits, write_shards
from tristill.stages.dump.prepare import cache_spec, split_specs
from tristill.stages.errors import CheckpointError, TargetsError
from tristill.stages.evaluate.config import EvaluateConfig
from tristill.stages.evaluate.evaluate import evaluate
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.language_model import State
from tristill.stages.models.origin import model_fingerprint
from tristill.stages.models.transformer import Transformer
from tristill.stages.progress import Progress
from tristill.stages.quantize.config import QuantizeConfig
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.source import Epoch, Signals


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def test_the_cache_holds_what_the_teacher_says(run: Path, tmp_path: Path) -> None:
    for tau in (1.0, 3.0):
        config = dump_config(profile={"kind": "plain_topk", "top_k": 5, "temperature": tau, "logit_dtype": "float32"})
        dump_logits(config, run / "data", run / "teacher", tmp_path / f"{tau}")
        cache = open_cache(tmp_path / f"{tau}")
        teacher = load_model(run / "teacher")
        windows = split_windows(run / "data", "train")
        for index in (0, 17, 699):
            found = cache.window("train", index)
            np.testing.assert_array_equal(found.input_ids, windows.read([index]))
            ids = torch.from_numpy(found.input_ids.astype(np.int64))
            with torch.no_grad():
                features = teacher(ids[:, :-1], [State("residual", layer) for layer in (0, 2)])
                z = features.final_BTD @ teacher.head_weight.T
            p = torch.softmax(z.double() / tau, dim=-1)
            head = torch.from_numpy(found.target["head_ids"].astype(np.int64))
            torch.testing.assert_close(head, z.topk(5).indices)
            relative = (z.gather(-1, head) - z.amax(-1, keepdim=True)) / tau
            torch.testing.assert_close(torch.from_numpy(found.target["head_logits"]), relative, rtol=1e-4, atol=1e-5)
            tail = torch.from_numpy(found.target["tail_logsumexp"]).double()
            log_z = torch.logaddexp(torch.from_numpy(found.target["head_logits"]).double().logsumexp(-1), tail)
            torch.testing.assert_close((tail - log_z).exp(), p.scatter(-1, head, 0).sum(-1), rtol=1e-4, atol=1e-7)
            for layer in (0, 2):
                expected = features.hidden[State("residual", layer)].half().numpy()
                np.testing.assert_allclose(found.hidden[layer], expected, rtol=2e-3, atol=1e-3)


def test_bytes_do_not_depend_on_workers_or_on_what_was_there_before(run: Path, tmp_path: Path) -> None:
    config = dump_config(batch_windows=3)
    dump_logits(config, run / "data", run / "teacher", tmp_path / "whole")
    teacher = load_model(run / "teacher").eval()
    fingerprint = model_fingerprint(run / "teacher")
    hidden = HiddenSpec(layers=config.hidden_layers, width=SHAPE.width)
    profile = PlainTopKProfile(top_k=5, logit_dtype="float32")
    corpus = load_corpus(run / "data")
    windows = {split: split_windows(run / "data", split) for split in corpus.splits}
    spec = cache_spec(config, corpus, split_specs(config, corpus, windows), fingerprint, profile, hidden, None)
    tokenizer = (run / "data" / "tokenizer.json").read_bytes()
    writer = CacheWriter(tmp_path / "other", spec, tokenizer)
    with Progress("dump", None, "positions") as progress:
        write_shards(writer, writer.missing_shards(), teacher, windows, config, progress.advance, num_workers=5)
    writer.finish()
    (tmp_path / "other" / "train-00001.h5").unlink()
    (tmp_path / "other" / "cache.json").unlink()
    dump_logits(config, run / "data", run / "teacher", tmp_path / "other")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert len(whole) > 4


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_cached_at_full_vocabulary_and_online_give_one_loss_trace(
    run: Path, tmp_path: Path, temperature: float
) -> None:
    vocab_size = load_corpus(run / "data").vocab_size
    dump = dump_config(profile={"kind": "plain_topk", "top_k": vocab_size, "logit_dtype": "float32"})
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "cache")
    traces = {}
    for targets in ("cached", "online"):
        config = distill_config(targets=targets, alpha=0.3, temperature=temperature)
        summary, log = student_of(run, tmp_path / "cache", tmp_path / targets, config, dump)
        assert summary.targets == targets
        traces[targets] = log
        traces[f"{targets} validation"] = [summary.validation.model_dump(exclude={"calibration", "standard_errors"})]
    for cached, online in zip(traces["cached"], traces["online"], strict=True):
        for key in ("loss", "terms", "grad_norm"):
            assert cached[key] == pytest.approx(online[key], rel=2e-4), f"{key} at step {cached['step']}"
    assert traces["cached validation"][0] == pytest.approx(traces["online validation"][0], rel=2e-3, abs=1e-5)


def test_hidden_states_from_the_cache_give_the_loss_of_the_online_ones(run: Path, tmp_path: Path) -> None:
    dump = dump_config()
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "cache")
    losses = []
    for targets in ("cached", "online"):
        config = distill_config(targets=targets, alpha=1.0, hidden={"weight": 0.5, "layers": {"1": 2, "0": 0}})
        _, log = student_of(run, tmp_path / "cache", tmp_path / targets, config, dump)
        losses.append([record["terms"]["hidden_mse"] for record in log])  # type: ignore[index]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert min(losses[0]) > 0


def test_stage_two_needs_neither_teacher_nor_corpus(run: Path, tmp_path: Path) -> None:
    dump = dump_config()
    dump_logits(dump, run / "data", run / "teacher", tmp_path / "cache")
    gone = tmp_path / "gone"
    config = distill_config(targets="cached", hidden={"weight": 0.1, "layers": {"1": 2}})
    summary, _ = student_of(gone, tmp_path / "cache", tmp_path / "student", config, dump)
    assert summary.validation.kl_to_teacher_nats is not None
    assert (tmp_path / "student" / "tokenizer.json").read_bytes() == (run / "data" / "tokenizer.json").read_bytes()
    student = load_model(tmp_path / "student")
    assert (
        evaluate(student, CachedSource(open_cache(tmp_path / "cache"), CPU), EvaluateConfig(), "") == summary.validation
    )


def test_online_windows_come_in_the_order_of_the_cache_that_the_same_settings_dump(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tristill.cache.order.SHARDS_PER_RUN", 1)
    dump_logits(dump_config(), run / "data", run / "teacher", tmp_path / "cache")

    def ids_of(targets: str, dump: DumpConfig) -> list[bytes]:
        source = choose_source(
            distill_config(targets=targets), dump, SHAPE.layers, places(run, tmp_path / "cache"), CPU
        )
        return [batch.input_ids_BT.numpy().tobytes() for batch in source.batches("train", 8, Signals(), Epoch(seed=1))]

    cached = ids_of("cached", dump_config())
    assert ids_of("online", dump_config()) == cached
    assert ids_of("online", dump_config(shard_positions=2**17)) != cached, "one run instead of two"


def test_the_teacher_agrees_with_its_own_cache(run: Path, tmp_path: Path) -> None:
    dump_logits(dump_config(), run / "data", run / "teacher", tmp_path / "cache")
    source = CachedSource(open_cache(tmp_path / "cache"), CPU)
    metrics = evaluate(load_model(run / "teacher"), source, EvaluateConfig(), "")
    assert metrics.kl_to_teacher_nats == pytest.approx(0, abs=1e-5)
    assert metrics.top1_agreement == 1
    assert metrics.acceptance_rate == pytest.approx(1, abs=1e-4)


def test_a_student_can_start_as_its_teacher(run: Path, tmp_path: Path) -> None:
    dump_logits(dump_config(), run / "data", run / "teacher", tmp_path / "cache")
    config = distill_config(targets="cached", training={"steps": 1, "learning_rate": 1e-12, "batch_windows": 8})
    plain = QuantizeConfig(weights="none", activations="none")
    summary, _ = student_of(
        run,
        tmp_path / "cache",
        tmp_path / "student",
        config,
        dump_config(),
        StudentConfig(init="teacher", quantize=plain),
    )
    assert summary.validation.kl_to_teacher_nats == pytest.approx(0, abs=1e-4)
    other = SHAPE.model_copy(update={"mlp_width": 32})
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight: found \(24, 16\), expected \(32, 16\).*leave student"
    ):
        student_of(
            run, tmp_path / "cache", tmp_path / "x", config, dump_config(), StudentConfig(init="teacher", model=other)
        )


CODES = [
    QuantizeConfig(weights="nbit", bits=4),
    QuantizeConfig(weights="nbit-diffused", bits=3),
    QuantizeConfig(weights="nbit-learned", bits=2),
]


@pytest.mark.parametrize("quantize", CODES, ids=lambda quantize: quantize.weights)
@pytest.mark.parametrize("init", ["random", "teacher"])
def test_a_student_of_n_bits_is_saved_as_it_was_evaluated(
    run: Path, tmp_path: Path, quantize: QuantizeConfig, init: str
) -> None:
    dump_logits(dump_config(), run / "data", run / "teacher", tmp_path / "cache")
    student = StudentConfig.model_validate({"quantize": quantize, "init": init})
    folder = tmp_path / "student"
    summary, log = student_of(run, tmp_path / "cache", folder, distill_config(), dump_config(), student)
    assert len({record["loss"] for record in log}) == 12
    again = load_model(folder)
    assert again.quantize == quantize
    source = CachedSource(open_cache(tmp_path / "cache"), CPU)
    assert evaluate(again, source, EvaluateConfig(), "") == summary.validation
    assert summary.model.ternary_parameters == 0


def test_a_student_from_its_teacher_starts_with_the_steps_of_its_weights(run: Path, tmp_path: Path) -> None:
    dump_logits(dump_config(), run / "data", run / "teacher", tmp_path / "cache")
    config = distill_config(training={"steps": 1, "learning_rate": 1e-12, "batch_windows": 8})
    student = StudentConfig(init="teacher", quantize=QuantizeConfig(weights="nbit-learned", bits=8))
    student_of(run, tmp_path / "cache", tmp_path / "student", config, dump_config(), student)
    found, teacher = load_model(tmp_path / "student").state_dict(), load_model(run / "teacher").state_dict()
    steps = {name for name in found if name.endswith("log_step")}
    assert found.keys() - steps == teacher.keys()
    assert len(steps) == 7 * SHAPE.layers
    for name in steps:
        weight = teacher[name.replace("log_step", "weight")]
        assert float(found[name].exp()) == pytest.approx(2 * float(weight.abs().mean()) / 127**0.5, rel=1e-5)


Refusal = tuple[dict[str, object], str]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 4.0}, "temperature 4 is asked for, but this plain_topk cache is exact at 1 only"),
        ({"hidden": {"layers": {"1": 1}}}, r"hidden states of layers \[1\] are asked for, .* holds those of \[0, 2\]"),
    ],
)
def test_what_the_cache_cannot_serve_is_refused_or_goes_online_with_the_reason(
    run: Path, tmp_path: Path, changes: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dump_logits(dump_config(), run / "data", run / "teacher", tmp_path / "cache")
    where = places(run, tmp_path / "cache")
    with pytest.raises(TargetsError, match=f"{message}.*, or forward the teacher at every step: --targets online"):
        choose_source(distill_config(**changes), dump_config(), SHAPE.layers, where, CPU)
    capsys.readouterr()
    source = choose_source(distill_config(targets="auto", **changes), dump_config(), SHAPE.layers, where, CPU)
    assert source.kind == "online"
    assert "targets: online, since the cache does not serve:" in capsys.readouterr().err
    with pytest.raises(
        TargetsError, match=r"online targets need it, and config.json is not there; run `tristill teach"
    ):
        choose_source(
            distill_config(targets="auto", **changes),
            dump_config(),
            SHAPE.layers,
            places(tmp_path / "gone", tmp_path / "cache"),
            CPU,
        )


def test_labels_alone_need_no_target_of_any_temperature(run: Path, tmp_path: Path) -> None:
    dump_logits(dump_config(), run / "data", run / "teacher", tmp_path / "cache")
    config = distill_config(targets="cached", alpha=1.0, temperature=9.0)
    assert choose_source(config, dump_config(), SHAPE.layers, places(run, tmp_path / "cache"), CPU).kind == "cached"


@pytest.mark.parametrize("what", ["teacher", "tokenizer"])
def test_a_cache_of_another_teacher_or_tokenizer_is_refused(run: Path, tmp_path: Path, what: str) -> None:
    dump_logits(dump_config(), run / "data", run / "teacher", tmp_path / "cache")
    where = Places(tmp_path / "cache", run / "data", run / "teacher", **{f"{what}_fingerprint": "0" * 64})
    for targets in ("cached", "auto"):
        with pytest.raises(CacheMismatchError, match=f"the cache was made by another {what}: found fingerprint .*000"):
            choose_source(distill_config(targets=targets), dump_config(), SHAPE.layers, where, CPU)


def test_a_dump_refuses_a_teacher_of_another_vocabulary_and_layers_it_has_not(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hidden_layers: found \[3\], but the teacher has 2 blocks"):
        dump_logits(dump_config(hidden_layers=[3]), run / "data", run / "teacher", tmp_path / "cache")
    shutil.copytree(run / "data", tmp_path / "data")
    described = json.loads((tmp_path / "data" / "data.json").read_text())
    (tmp_path / "data" / "data.json").write_text(json.dumps({**described, "vocab_size": 269}))
    with pytest.raises(CheckpointError, match=r"teacher has 270 output entries, .* corpus has 269"):
        dump_logits(dump_config(), tmp_path / "data", run / "teacher", tmp_path / "cache")


def test_sizes_count_two_bits_for_ternary_weights_and_sixteen_for_the_rest() -> None:
    shape = ModelConfig(width=256, layers=2, heads=4, mlp_width=768)
    size = model_size(Transformer(shape, 2048, QuantizeConfig()))
    ternary = 2 * (4 * 256 * 256 + 3 * 256 * 768)
    assert size.ternary_parameters == ternary
    assert size.parameters == ternary + 2048 * 256 + 5 * 256
    assert size.packed_bytes == ternary // 4 + 2 * (2048 * 256 + 5 * 256 + 14)
    twin = model_size(Transformer(shape, 2048, QuantizeConfig(weights="none")))
    assert twin.packed_bytes == 2 * twin.parameters
    rows = 2 * (5 * 256 + 2 * 768)
    for code, scales in (("nbit", rows), ("nbit-diffused", rows), ("nbit-learned", 14)):
        config = QuantizeConfig.model_validate({"weights": code, "bits": 3})
        other = model_size(Transformer(shape, 2048, config))
        assert (other.parameters, other.ternary_parameters) == (size.parameters, 0)
        assert other.packed_bytes == 3 * ternary // 8 + 2 * (2048 * 256 + 5 * 256 + scales)


def test_profile_of_the_config_is_that_of_the_cache(run: Path, tmp_path: Path) -> None:
    dump_logits(dump_config(), run / "data", run / "teacher", tmp_path / "cache")
    assert open_cache(tmp_path / "cache").spec.profile == PlainTopKProfile(top_k=5, logit_dtype="float32")
