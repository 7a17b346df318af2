"""How well the order of windows mixes, and how much of a cache each of many ranks reads: index only, no data.

    python -m benchmarks.order_quality [--seeds 0 1 2]

Windows of 256 positions in blocks of 32 and shards of 512, the defaults. Neighbours are windows that are stored one
after the other. Of a perfect shuffle they are a third of the epoch apart in the mean, and the correlation of the places
of N windows in two orders is zero but for chance, 1 / sqrt(N). What ranks read is summed over all of them and divided
by what there is: 1.0 if everything is read once.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np

from benchmarks.environment import environment
from tristill.cache.order import Deal, WindowOrder
from tristill.pipeline.results import text_table

RESULTS = Path(__file__).parent / "results" / "order_quality.json"
PER_BLOCK, PER_SHARD = 32, 512
SHARDS = (5, 64, 640, 4096)
RANKS = ((1, 8), (8, 64), (64, 64), (64, 512), (1000, 1000), (1000, 8000))
SHARDS_OF_RANKS = 640


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    mixing = {num_shards: [mixed(num_shards, seed) for seed in arguments.seeds] for num_shards in SHARDS}
    reading = {f"{ranks}, {batch}": read_by_ranks(ranks, batch) for ranks, batch in RANKS}
    titles = ["shards", "windows", "two epochs", "stored order", "neighbours apart", "in one batch of 8", "by chance"]
    rows = [
        [
            f"{num_shards:,}",
            f"{num_shards * PER_SHARD:,}",
            *(f"{max((row[i] for row in found), key=abs):+.4f}" for i in (0, 1)),
            f"{statistics.mean(row[2] for row in found):.1%}",
            f"{statistics.mean(row[3] for row in found):.3%}",
            f"{7 / (num_shards * PER_SHARD - 1):.3%}",
        ]
        for num_shards, found in mixing.items()
    ]
    markdown = text_table([titles, *rows]) + "\n\n"
    titles = ["ranks", "windows per batch", "shards read", "blocks read"]
    rows = [
        [str(ranks), str(batch), *(f"{value:.1f}" for value in reading[f"{ranks}, {batch}"])] for ranks, batch in RANKS
    ]
    markdown += text_table([titles, *rows])
    result = {
        "seeds": arguments.seeds,
        "mixing": mixing,
        "reading": reading,
        "environment": environment(),
        "markdown": markdown,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(markdown)


def mixed(num_shards: int, seed: int) -> tuple[float, float, float, float]:
    """Of one epoch: how far its order is from others, and neighbours from one another.

    Correlations of places with those of the next epoch and of the stored order; of neighbours the mean distance as a
    share of the epoch, and the share of pairs in one batch of 8.
    """
    num_windows = num_shards * PER_SHARD
    places = []
    for epoch in (0, 1):
        order = WindowOrder(num_windows, PER_BLOCK, PER_SHARD, seed, epoch)
        windows = np.concatenate([group.windows for _, group in order.groups()])
        place = np.empty(num_windows, np.int64)
        place[windows] = np.arange(num_windows)
        places.append(place)
    apart = np.abs(np.diff(places[0]))
    together = places[0][1:] // 8 == places[0][:-1] // 8
    return (
        float(np.corrcoef(places[0], places[1])[0, 1]),
        float(np.corrcoef(places[0], np.arange(num_windows))[0, 1]),
        float(apart.mean()) / num_windows,
        float(together.mean()),
    )


def read_by_ranks(ranks: int, batch: int) -> tuple[float, float]:
    """Shards and blocks that ranks read in an epoch, summed, over how many there are."""
    num_windows = SHARDS_OF_RANKS * PER_SHARD
    order = WindowOrder(num_windows, PER_BLOCK, PER_SHARD, seed=0)
    batches_MB = np.concatenate(list(order.batches(Deal(batch))))
    batches_MB = np.sort(batches_MB, axis=1)  # the shares of all ranks, one after the other
    rank_B = np.arange(batch) // (batch // ranks)
    counts = []
    for each in (PER_SHARD, PER_BLOCK):
        total = num_windows // each
        counts.append(len(np.unique(rank_B * total + batches_MB // each)) / total)
    return counts[0], counts[1]


if __name__ == "__main__":
    main()
