"""Many processes train what one does: the same losses to rounding, from any number of them to any other."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from chats import chat_settings, make_tokenizer, some_chats, write_json_lines
from pydantic import ValidationError
from rank_jobs import Job, do, do_together
from small_models import write_model
from small_training import CPU, SHAPE, distill_config, dump_config, make_run, make_teacher

from tristill.cache import open_cache
from tristill.stages.data.config import DataConfig
from tristill.stages.data.tokenize import tokenize_corpus
from tristill.stages.dump.dump import dump_logits
from tristill.stages.ranks import Ranks
from tristill.stages.targets.cached import CachedSource
from tristill.stages.targets.online import OnlineSource
from tristill.stages.targets.source import Epoch, Signals, TargetSource, endless_batches

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

TRAINING = {"steps": 6, "learning_rate": 1e-2, "batch_windows": 6, "log_every": 1, "checkpoint_every": 4}
ADAPTIVE = {"kind": "adaptive", "start": 2.0, "bound_nats": 9.0, "patience": 2}
EVERYTHING: dict[str, Any] = {
    "losses": [
        {"kind": "cross_entropy", "weight": 0.3},
        {"kind": "forward_kl", "weight": 1.0, "temperature": ADAPTIVE},
        {"kind": "reverse_kl", "weight": 0.2, "temperature": 1.0},
    ],
    "hidden": {"weight": 0.5, "layers": {"1": 2}, "projection": "always"},
    "mining": {"fraction": 0.4},
    "entropy_weights": {"power": 1.0},
    "balance": {"every": 2},
}
"""All that looks at a whole batch, or remembers what it saw."""
DUMP = {"profile": {"kind": "transform", "step": 0.1, "temperatures": [1.0, 2.0]}, "hidden": {"stride": 2}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokens, a teacher and a cache of plain text, and of chats of which about a fifth counts."""
    plain, chats = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("chats")
    make_run(plain)
    path = write_json_lines(chats / "rows.jsonl", [{"messages": chat} for chat in some_chats(220)])
    settings = chat_settings(path, make_tokenizer(chats / "tokenizer"), context_length=12)
    tokenize_corpus(DataConfig.model_validate(settings), chats / "data")
    make_teacher(chats, "teacher", SHAPE, steps=30)
    for run in (plain, chats):
        dump_logits(dump_config(**DUMP), run / "data", run / "teacher", run / "cache")
    write_model(plain / "qwen3", "qwen3", plain / "data" / "tokenizer.json", outputs=270)
    return {"plain": plain, "chats": chats}


def job(runs: dict[str, Path], folder: Path, name: str, **training: object) -> Job:
    """A training by its name, in a folder of that name."""
    run = runs["chats" if "masked" in name else "plain"]
    settings: dict[str, Any] = {**TRAINING, **training}
    if "teacher" in name:
        return Job(str(folder / name), str(run), None, {"model": SHAPE.model_dump(), "training": settings})
    config: dict[str, Any] = {**EVERYTHING, "training": settings}
    student: dict[str, Any] = {}
    if "online" in name or "co-trained" in name:
        config["targets"] = "online"
    if "relations" in name:
        config["relations"] = {"weight": 0.1, "heads": 4, "layers": {"2": 2}}
        del config["mining"]  # whose number of positions is none that can be miscounted
    if "ends" in name:
        ending = {"kind": "step", "values": [1.0, 0.0], "milestones": [0.5]}
        config["losses"] = [{"kind": "cross_entropy", "weight": ending}]
        del config["entropy_weights"]
    if "accumulated" in name:
        config["training"] = {**settings, "accumulation": 2, "grad_clip": 0.1}
    if "co-trained" in name:
        config["online"] = {"co_train": True, "ema": 0.9}
    if "tied" in name:
        student["model"] = {**SHAPE.model_dump(), "subln": True, "tied_embeddings": True}
    if "head" in name:
        student["quantize"] = {"layers": ["model.layers.*", "lm_head"]}
    if "steps" in name:
        student["quantize"] = {"weights": "learned", "scale_per": "row", "layers": ["model.layers.*", "lm_head"]}
    if "qwen3" in name:
        student |= {"path": str(run / "qwen3"), "quantize": {"layers": ["model.layers.*"]}}
    return Job(str(folder / name), str(run), "" if "targets" in config else str(run / "cache"), config, student, DUMP)


def lines(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(job.folder) / "metrics.jsonl").read_text().splitlines()]


def summary(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(job.folder) / "summary.json").read_text())
    return found


def numbers(record: Any, at: str = "") -> dict[str, float]:
    """All numbers in a record by their place, but those of the machine."""
    pairs = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    found = {} if isinstance(record, dict | list | str | None) else {at: record}
    for key, value in pairs:
        if key not in {"positions_per_s", "elapsed_s", "peak_rss_mib"}:
            found |= numbers(value, f"{at}/{key}")
    return found


def require_equal(found: Job, expected: Job) -> None:
    """Traces of losses, gradients and all telemetry, metrics and weights: to rounding, which in a few steps may turn a
    trit or two."""
    assert len(lines(found)) == len(lines(expected))
    for step, pair in enumerate(zip(lines(found), lines(expected), strict=True)):
        mine, theirs = map(numbers, pair)
        assert mine == pytest.approx(theirs, rel=2e-3 if step else 5e-6, abs=1e-4 if step else 1e-6), step
    assert numbers(summary(found)) == pytest.approx(numbers(summary(expected)), rel=1e-3)
    first, second = (safetensors.torch.load_file(Path(one.folder) / "model.safetensors") for one in (found, expected))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert float((tensor - second[name]).abs().max()) < 1e-3, name  # a step of AdamW moves a weight by 1e-2


TOGETHER = {
    2: {
        "teacher": "ddp",
        "masked cached": "fsdp",
        "co-trained": "ddp",
        "online relations accumulated": "ddp",
        "cached tied": "fsdp",
    },
    3: {"masked teacher": "fsdp", "masked online relations": "ddp", "cached head steps": "fsdp"},
}
"""What is trained by how many, and how: a few of all that could be; the slow test has others."""
ELSE = [
    "cached qwen3 accumulated",
    "online head tied relations",
    "masked cached relations",
    "cached steps",
    "cached ends",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(runs: dict[str, Path], folder: Path) -> Callable[[str], Job]:
    """The same training by one process."""
    done: dict[str, Job] = {}

    def train(name: str) -> Job:
        if name not in done:
            done[name] = job(runs, folder / "1", name)
            assert do(done[name]) == ""
        return done[name]

    return train


@pytest.fixture(scope="module")
def by_two(runs: dict[str, Path], folder: Path) -> dict[str, list[str]]:
    """How all that two processes do ended on each."""
    jobs = {name: job(runs, folder / "2", name, parallel=how) for name, how in TOGETHER[2].items()}
    jobs["failed"] = replace(job(runs, folder / "cut", "cached tied", parallel="fsdp"), fails_after=5)
    jobs["stopped"] = replace(job(runs, folder / "cut", "cached", checkpoint_every=100), stopped=(1, 2))
    again = job(runs, folder / "again", "cached", checkpoint_every=100)
    jobs |= {"cut short": replace(again, stopped=(0, 2)), "again": again, "whole": job(runs, folder / "2", "cached")}
    jobs["spoiled"] = replace(jobs["teacher"], spoiled=1)
    jobs["scalars"] = job(runs, folder / "2", "refused", parallel="fsdp")
    jobs["scalars"] = replace(jobs["scalars"], student={"quantize": {"weights": "learned"}})
    return do_together(2, jobs, folder)


@pytest.fixture(scope="module")
def by_three(runs: dict[str, Path], folder: Path, by_two: dict[str, list[str]]) -> dict[str, list[str]]:
    """The same of three, who also go on where two were cut off."""
    assert by_two["failed"] == ["RuntimeError: pulled the plug"] * 2
    shutil.copytree(folder / "cut", folder / "resumed")
    shutil.copytree(folder / "cut", folder / "alone")
    jobs = {name: job(runs, folder / "3", name, parallel=how) for name, how in TOGETHER[3].items()}
    jobs["failed"] = job(runs, folder / "resumed", "cached tied", parallel="fsdp")
    jobs["stopped"] = job(runs, folder / "resumed", "cached", parallel="fsdp")
    jobs["uneven"] = job(runs, folder / "3", "uneven", batch_windows=8)
    return do_together(3, jobs, folder)


@pytest.mark.parametrize(("world_size", "name"), [(n, name) for n, names in TOGETHER.items() for name in names])
def test_any_number_of_ranks_trains_what_one_process_trains(
    world_size: int, name: str, alone: Callable[[str], Job], request: pytest.FixtureRequest, folder: Path
) -> None:
    ends = request.getfixturevalue("by_two" if world_size == 2 else "by_three")
    assert ends[name] == [""] * world_size
    expected = alone(name)
    require_equal(replace(expected, folder=str(folder / str(world_size) / name)), expected)
    assert {path.name for path in (folder / str(world_size) / name).iterdir()} == {
        path.name for path in Path(expected.folder).iterdir()
    }


def test_a_rank_may_have_no_position_that_counts(runs: dict[str, Path]) -> None:
    """What is tested above on masked tokens is tested on such batches."""
    source = OnlineSource(runs["chats"] / "data", CPU)
    streams = [endless_batches(source, 6, Signals(), 0, ranks=Ranks(rank, 3))(0) for rank in range(3)]
    counts = np.array([[int(next(stream).counts_BT.sum()) for stream in streams] for _ in range(6)])  # type: ignore[union-attr]
    assert ((counts == 0).any(axis=1) & (counts > 0).any(axis=1)).any()


def test_shards_of_a_training_are_taken_up_by_any_number_of_ranks(
    by_two: dict[str, list[str]], by_three: dict[str, list[str]], alone: Callable[[str], Job], folder: Path
) -> None:
    """Written by two that shared the tensors; read by three that do, and by one."""
    (kept,) = (folder / "alone" / "cached tied" / "checkpoints").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == [
        "module-1.safetensors", "module.safetensors", "optimizer-1.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    halves = [safetensors.torch.load_file(kept / name) for name in ("optimizer.safetensors", "optimizer-1.safetensors")]
    sizes = [sum(tensor.numel() for name, tensor in half.items() if "exp_avg" in name) for half in halves]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert by_three["failed"] == [""] * 3
    expected = alone("cached tied")
    require_equal(replace(expected, folder=str(folder / "resumed" / "cached tied")), expected)
    one = replace(expected, folder=str(folder / "alone" / "cached tied"))
    assert do(one) == ""
    require_equal(one, expected)


def test_one_rank_that_is_told_to_stop_stops_all_after_one_step(
    by_two: dict[str, list[str]], by_three: dict[str, list[str]], alone: Callable[[str], Job], folder: Path
) -> None:
    """And copies that were stopped are taken up by ranks that share tensors, and by one."""
    assert by_two["stopped"] == ["KeyboardInterrupt: "] * 2
    (kept,) = (folder / "alone" / "cached" / "checkpoints").iterdir()
    assert kept.name == "step-00000003"
    assert sorted(path.name for path in kept.iterdir()) == ["module.safetensors", "optimizer.safetensors", "state.json"]
    assert by_three["stopped"] == [""] * 3
    expected = alone("cached")
    require_equal(replace(expected, folder=str(folder / "resumed" / "cached")), expected)
    one = replace(expected, folder=str(folder / "alone" / "cached"))
    assert do(one) == ""
    require_equal(one, expected)


def test_two_ranks_that_go_on_where_they_were_stopped_train_the_same_bits(
    by_two: dict[str, list[str]], folder: Path
) -> None:
    assert [by_two[name] for name in ("cut short", "again", "whole")] == [
        ["KeyboardInterrupt: "] * 2,
        [""] * 2,
        [""] * 2,
    ]
    resumed, whole = (folder / name / "cached" for name in ("again", "2"))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_ranks_that_no_longer_agree_are_found_out(by_two: dict[str, list[str]]) -> None:
    (text,) = set(by_two["spoiled"])
    assert text.startswith(
        "StageError: here: found 0.weight on rank 1 to differ from that on rank 0, expected the same bits on all 2"
    )


def test_what_ranks_cannot_share_is_refused(by_two: dict[str, list[str]], by_three: dict[str, list[str]]) -> None:
    assert all("found 14 learned numbers without rows" in end and "'ddp'" in end for end in by_two["scalars"])
    expected = "StageError: training.batch_windows: found 8, expected a multiple of the 3 ranks, which share"
    assert all(end.startswith(expected) for end in by_three["uneven"])
    with pytest.raises(ValidationError, match="compile: is for whole tensors, and parallel = 'fsdp' shares them out"):
        distill_config(training={**TRAINING, "compile": True, "parallel": "fsdp"})
    with pytest.raises(ValidationError, match="a teacher that moves with the student is not shared out among ranks"):
        distill_config(training={**TRAINING, "parallel": "fsdp"}, targets="online", online={"co_train": True})


@pytest.mark.parametrize("batch_windows", [6, 12])
@pytest.mark.parametrize("kind", ["cached", "online"])
def test_ranks_share_every_batch_and_have_all_of_it_together(
    runs: dict[str, Path], kind: str, batch_windows: int
) -> None:
    source: TargetSource = OnlineSource(runs["chats"] / "data", CPU)
    if kind == "cached":
        source = CachedSource(open_cache(runs["chats"] / "cache"), CPU)
    for split, seed in (("train", 3), ("validation", None)):
        whole = source.batches(split, batch_windows, Signals(), Epoch(seed))  # type: ignore[arg-type]
        shares = [
            list(source.batches(split, batch_windows, Signals(), Epoch(seed, ranks=Ranks(rank, 3))))  # type: ignore[arg-type]
            for rank in range(3)
        ]
        for number, batch in enumerate(whole):
            parts = [share[number].input_ids_BT for share in shares if number < len(share)]
            assert sorted(torch.cat(parts).tolist()) == sorted(batch.input_ids_BT.tolist())
            if seed is not None:
                assert [len(part) for part in parts] == [batch_windows // 3] * 3


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_both_ways_train_what_one_process_trains(
    world_size: int, runs: dict[str, Path], alone: Callable[[str], Job], tmp_path: Path
) -> None:
    names = {*TOGETHER[2], *TOGETHER[3], *ELSE}
    found = {
        f"{name} {how}": job(runs, tmp_path / how, name, parallel=how)
        for name in names
        for how in ("ddp", "fsdp")
        if (name, how) != ("co-trained", "fsdp")
    }
    ends = do_together(world_size, found, tmp_path, timeout_s=500)
    assert ends == {name: [""] * world_size for name in found}
    for name, one in found.items():
        require_equal(one, alone(name.rsplit(" ", 1)[0]))
