"""What a resumed training takes from its checkpoint beside the weights: the count of its records, and its threads."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_training import config, make_module, training

from tristill.cache.atomic import sync_file
from tristill.stages.threads import num_threads, torch_threads
from tristill.stages.training import metrics
from tristill.stages.training.checkpoint import threads_of_checkpoint


def cut(folder: Path, stop_at: int = 7) -> Path:
    """A training that was ended after its checkpoint of step 5; its metrics."""
    with pytest.raises(RuntimeError, match="pulled"):
        training(folder, make_module(), config(checkpoint_every=5, log_every=1), stop_at=stop_at).run()
    return folder / "metrics.jsonl"


def test_records_that_a_checkpoint_counts_and_are_lost_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = cut(tmp_path).read_text().splitlines(keepends=True)
    assert json.loads((tmp_path / "checkpoints" / "step-00000005" / "state.json").read_text())["num_records"] == 5
    cut(tmp_path)
    assert "records" not in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]))
    cut(tmp_path)
    assert "metrics.jsonl: found 2 of the 10 records up to step 10; the others are lost" in capsys.readouterr().err


def test_records_are_on_disk_before_a_checkpoint_counts_them_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bool]] = []

    def watched(path: Path) -> None:
        sync_file(path)
        if path.name == "metrics.jsonl":
            synced.append((path.read_text().count("\n"), (tmp_path / "checkpoints" / "step-00000005").is_dir()))

    monkeypatch.setattr(metrics, "sync_file", watched)
    training(tmp_path, make_module(), config(steps=8, checkpoint_every=5, log_every=1)).run()
    assert synced == [(5, False), (8, True)]


def batches(first: int) -> Iterator[torch.Tensor]:
    number = first
    while True:
        yield torch.randn(64, 768, generator=torch.Generator().manual_seed(number))
        number += 1


class Scaled(nn.Linear):
    """Weights over their mean magnitude, whose sum two threads round otherwise than one, as in a ternary layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight / self.weight.abs().mean())


def wide_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Scaled(768, 256, bias=False), nn.Linear(256, 1))


def test_a_resumed_training_takes_the_threads_that_it_was_begun_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, before = config(checkpoint_every=5), num_threads()
    other = before + 1
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, resumed = wide_module(), wide_module()
    with torch_threads(other):
        summary = training(tmp_path / "whole", whole, settings, batches=batches).run()
        with pytest.raises(RuntimeError, match="pulled"):
            training(tmp_path / "cut", wide_module(), settings, stop_at=7, batches=batches).run()
    assert summary.threads == other
    checkpoints = tmp_path / "cut" / "checkpoints"
    with threads_of_checkpoint(checkpoints, "teacher"):
        assert training(tmp_path / "cut", resumed, settings, batches=batches).run().threads == other
    assert f"teacher: goes on with {other} threads of torch, as it was begun" in capsys.readouterr().err
    assert num_threads() == before
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_threads_of_a_training_on_more_ranks_are_not_taken(tmp_path: Path) -> None:
    cut(tmp_path)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    state = json.loads((saved / "state.json").read_text())
    for ranks, expected in ((2, num_threads()), (1, num_threads() + 3)):
        (saved / "state.json").write_text(json.dumps({**state, "threads": num_threads() + 3, "ranks": ranks}))
        with threads_of_checkpoint(tmp_path / "checkpoints", "teacher"):
            assert num_threads() == expected
    with threads_of_checkpoint(tmp_path / "none", "teacher"):
        assert os.path.lexists(saved)
