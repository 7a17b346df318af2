"""What the loss adds to memory: by the chunk with the chunked head, by the batch where whole logits are held.

    python -m benchmarks.loss_memory

CE + forward KL with gradients in features and output matrix, float32, one thread, width 256, against a head of 16
entries with a tail (`sparse`) or the logits of a teacher's features (`whole`). Beside the chunked head: autograd's
cross_entropy + kl_div on the logits of all positions at once. Every point is a fresh process after a tiny warm-up.

All figures are over the inputs, which were there before, and the two gradients, which are the result. Exact ones are
sums of what torch's allocator recorded: `forward_mib` is the peak until the value is there, `peak_mib` until the
gradients are. `rss_mib`, the rise of the process's largest resident set, checks them from outside, unrecorded; it also
sees the matrix library's own buffers. Blocks above 64 KiB go back to the system at once (MALLOC_MMAP_THRESHOLD_).
Writes benchmarks/results/loss_memory.json and docs/loss_memory.svg.
"""

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.environment import environment
from tristill.pipeline.results import text_table
from tristill.stages.losses import chunked_head
from tristill.stages.losses.cross_entropy import CrossEntropy
from tristill.stages.losses.forward_kl import ForwardKL
from tristill.stages.losses.target import ComputedTargets, HeadTarget, Rows, Targets
from tristill.stages.losses.term import WeightedTerm
from tristill.stages.resources import peak_rss_mib

# N positions, V vocabulary, D width, K kept head entries

RESULTS = Path(__file__).parent / "results" / "loss_memory.json"
PLOT = Path(__file__).parent.parent / "docs" / "loss_memory.svg"
WIDTH = 256
HEAD_ENTRIES = 16
VOCABULARIES = (2048, 16_384)
POSITIONS = (1024, 4096, 32_768)
CHUNK_ROWS = (64, 256, 1024)
LARGEST_LOGITS = 2**26
ALPHA = 0.5
_MIB = 2**20


@dataclass(frozen=True)
class Point:
    """targets: sparse or whole. chunk_rows: positions in a chunk; None holds the logits of all."""

    vocab_size: int
    targets: str
    chunk_rows: int | None
    positions: int


@dataclass(frozen=True)
class SparseTargets:
    """Heads with a tail, as a `topk` cache gives them."""

    head: HeadTarget

    def chunk(self, rows: Rows, dtype: torch.dtype = torch.float32) -> HeadTarget:  # noqa: ARG002
        """Some rows."""
        head = self.head
        assert head.tail_logsumexp_NM is not None
        tail_NM = head.tail_logsumexp_NM[rows]
        return HeadTarget(head.head_ids_NK[rows], head.head_logits_NK[rows], tail_NM, head.temperatures)


@dataclass(frozen=True)
class Inputs:
    """What the loss is given."""

    final_ND: Tensor
    head_VD: Tensor
    labels_N: Tensor
    targets: Targets


def make_inputs(point: Point) -> Inputs:
    """Random inputs of one size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    vocab_size, num_positions = point.vocab_size, point.positions
    targets: Targets
    if point.targets == "sparse":
        first_N1 = torch.randint(vocab_size, (num_positions, 1), generator=generator)
        ids_NK = (first_N1 + torch.arange(HEAD_ENTRIES)) % vocab_size
        logits_NK = -normal(num_positions, HEAD_ENTRIES).abs()
        targets = SparseTargets(HeadTarget(ids_NK, logits_NK, normal(num_positions, 1), (1.0,)))
    else:
        targets = ComputedTargets(normal(num_positions, WIDTH), normal(vocab_size, WIDTH).div_(WIDTH**0.5))
    return Inputs(
        normal(num_positions, WIDTH).requires_grad_(),
        normal(vocab_size, WIDTH).div_(WIDTH**0.5).requires_grad_(),
        torch.randint(vocab_size, (num_positions,), generator=generator),
        targets,
    )


def chunked_loss(inputs: Inputs) -> Tensor:
    """The project's."""
    terms = [WeightedTerm(ALPHA, CrossEntropy()), WeightedTerm(1 - ALPHA, ForwardKL(1.0))]
    loss = chunked_head.chunked_head_loss(inputs.final_ND, inputs.head_VD, inputs.labels_N, inputs.targets, terms)
    return loss.total


def naive_loss(inputs: Inputs) -> Tensor:
    """The same number by autograd, from the logits of all positions."""
    logits_NV = inputs.final_ND @ inputs.head_VD.T
    log_q = torch.log_softmax(logits_NV, dim=-1)
    target = inputs.targets.chunk(slice(None))
    if isinstance(target, HeadTarget):
        log_p_NK, log_p_tail_N = target.log_probs(1.0)
        assert log_p_tail_N is not None
        log_q_NK = log_q.gather(-1, target.head_ids_NK)
        log_q_tail_N = (1 - log_q_NK.exp().sum(dim=-1)).log()
        log_q = torch.cat([log_q_NK, log_q_tail_N[:, None]], dim=-1)
        log_p = torch.cat([log_p_NK, log_p_tail_N[:, None]], dim=-1)
    else:
        log_p = target.log_probs(1.0)
    kl = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return ALPHA * functional.cross_entropy(logits_NV, inputs.labels_N) + (1 - ALPHA) * kl


def recorded() -> torch.autograd.profiler.profile:
    return torch.autograd.profiler.profile(profile_memory=True)


def allocated_mib(profile: torch.autograd.profiler.profile) -> tuple[float, float]:
    """(the largest sum of allocations less releases, the sum at the end), in the order they were made in."""
    held = peak = 0
    assert profile.kineto_results is not None
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / _MIB, held / _MIB


def measure(point: Point) -> dict[str, Any]:
    """One point, in a process that has measured no other."""
    torch.set_num_threads(1)
    if point.chunk_rows is not None:
        chunked_head._CHUNK_ELEMENTS = 0  # noqa: SLF001 - what is varied here
        chunked_head._SMALLEST_CHUNK_ROWS = point.chunk_rows  # noqa: SLF001
    loss: Callable[[Inputs], Tensor] = naive_loss if point.chunk_rows is None else chunked_loss
    tiny = make_inputs(replace(point, vocab_size=2 * HEAD_ENTRIES, positions=8))
    torch.autograd.grad(loss(tiny), (tiny.final_ND, tiny.head_VD))
    inputs = make_inputs(point)
    wanted = (inputs.final_ND, inputs.head_VD)
    gradients_mib = sum(tensor.nbytes for tensor in wanted) / _MIB
    before_mib = peak_rss_mib()
    torch.autograd.grad(loss(inputs), wanted)
    rss_mib = peak_rss_mib() - before_mib
    with recorded() as forward:
        total = loss(inputs)
    with recorded() as backward:
        gradients = torch.autograd.grad(total, wanted)
    forward_mib, held_mib = allocated_mib(forward)
    peak_mib = max(forward_mib, held_mib + allocated_mib(backward)[0])
    return {
        **asdict(point),
        "loss_nats": total.item(),
        "gradient_norms": [gradient.norm().item() for gradient in gradients],
        "gradients_mib": gradients_mib,
        "forward_mib": forward_mib - gradients_mib,
        "peak_mib": peak_mib - gradients_mib,
        "rss_mib": rss_mib - gradients_mib,
    }


def points() -> list[Point]:
    return [
        Point(vocab_size, targets, chunk_rows, positions)
        for vocab_size in VOCABULARIES
        for targets in ("sparse", "whole")
        for chunk_rows in (*CHUNK_ROWS, None)
        for positions in POSITIONS
        if positions * vocab_size <= LARGEST_LOGITS
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # read when the server that forks the processes starts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tristill.stages.losses.chunked_head"])
    rows = []
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for row in pool.map(measure, points()):
            rows.append(row)
            print(
                f"{row['vocab_size']}, {row['targets']}, {way(row)}, {row['positions']}: {row['peak_mib']:.1f} MiB",
                flush=True,
            )
    require_equal_losses(rows)
    result = {"width": WIDTH, "rows": rows, "environment": environment(), "markdown": table(rows)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows)
    print(result["markdown"])


def require_equal_losses(rows: list[dict[str, Any]]) -> None:
    """Every way computes the same value and gradients, or what was measured is not comparable."""
    expected: dict[tuple[int, str, int], list[float]] = {}
    for row in rows:
        found = [row["loss_nats"], *row["gradient_norms"]]
        first = expected.setdefault((row["vocab_size"], row["targets"], row["positions"]), found)
        if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(found, first, strict=True)):
            raise SystemExit(f"the losses differ: {found} and {first} at {row}")


def way(row: dict[str, Any]) -> str:
    return "all positions (autograd)" if row["chunk_rows"] is None else f"chunks of {row['chunk_rows']:,}"


def table(rows: list[dict[str, Any]]) -> str:
    """One line per way, its peaks by the number of positions."""
    lines: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((f"{row['vocab_size']:,}", row["targets"], way(row)), {})[row["positions"]] = row

    def cell(line: dict[int, dict[str, Any]], name: str) -> str:
        return " / ".join(f"{line[count][name]:,.1f}" if count in line else "-" for count in POSITIONS)

    counts = " / ".join(f"{count:,}" for count in POSITIONS)
    titles = ["vocabulary", "targets", "logits held", f"value, MiB at {counts} positions", "value and gradients", "RSS"]
    names = ("forward_mib", "peak_mib", "rss_mib")
    return text_table([titles, *([*key, *(cell(line, name) for name in names)] for key, line in lines.items())])


def plot(rows: list[dict[str, Any]]) -> None:
    """Positions against memory, a panel per vocabulary and kind of target; the value alone dotted."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "tristill"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(VOCABULARIES), figsize=(11, 7), sharex=True, sharey=True)
    for line, targets in enumerate(("sparse", "whole")):
        for column, vocab_size in enumerate(VOCABULARIES):
            panel = axes[line][column]
            for color, chunk_rows in enumerate((*CHUNK_ROWS, None)):
                key = (vocab_size, targets, chunk_rows)
                own = [row for row in rows if (row["vocab_size"], row["targets"], row["chunk_rows"]) == key]
                counts = [row["positions"] for row in own]
                panel.plot(counts, [row["peak_mib"] for row in own], "o-", color=f"C{color}", label=way(own[0]))
                panel.plot(counts, [row["forward_mib"] for row in own], ":", color=f"C{color}")
            panel.set(xscale="log", yscale="log", title=f"V = {vocab_size:,}, {targets} targets")
            panel.grid(visible=True, alpha=0.3)
    axes[0][0].legend()
    figure.supxlabel("positions")
    figure.supylabel("MiB over inputs and gradients: value and gradients, the value alone dotted")
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
