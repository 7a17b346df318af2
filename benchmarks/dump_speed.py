"""What the dump costs beside the teacher's bare forward pass: positions/s of both, in one process, alternating.

    python -m benchmarks.dump_speed [--run-dir runs/demo] [--rounds 10]

Needs the data and teacher of a run (`make teacher`). The bare pass computes every logit and keeps none.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from cache import CacheWriter
from pipeline.config import load_config
from pipeline.results import text_table
from stages.data.tokenized import load_corpus, split_windows
from stages.data.tokens import TokenWindows
from stages.dump.dump import batches_of, cache_spec, torch_threads, write_missing_shards
from stages.losses.chunked_head import chunks
from stages.models.folder import load_model, model_fingerprint
from stages.models.transformer import Transformer
from stages.progress import Progress

RESULTS = Path(__file__).parent / "results" / "dump_speed.json"


def bare_forward(teacher: Transformer, windows: TokenWindows, batches: list[list[int]], *, workers: bool) -> None:
    """Every logit of every window, computed and dropped: one operator on all cores, or one worker per core."""

    @torch.inference_mode()
    def forward(rows: list[int]) -> None:
        ids_BT1 = torch.from_numpy(windows.read(rows)).long()
        final_ND = teacher(ids_BT1[:, :-1]).final_BTD.flatten(0, 1)
        for part in chunks(len(final_ND), teacher.vocab_size):
            final_ND[part] @ teacher.head_weight.T

    if not workers:
        for rows in batches:
            forward(rows)
        return
    cores = torch.get_num_threads()
    with torch_threads(1) as set_threads, ThreadPoolExecutor(cores, initializer=set_threads) as pool:
        list(pool.map(forward, batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--windows", type=int, default=256)
    arguments = parser.parse_args()

    config = load_config(arguments.config).cache.model_copy(update={"max_train_windows": arguments.windows})
    data, teacher_folder = arguments.run_dir / "data", arguments.run_dir / "teacher"
    teacher = load_model(teacher_folder).eval()
    spec = cache_spec(config, load_corpus(data), teacher, model_fingerprint(teacher_folder))
    spec = spec.model_copy(update={"splits": {"train": spec.splits["train"]}})
    windows = split_windows(data, "train")
    positions = spec.num_positions("train")
    tokenizer = (data / "tokenizer.json").read_bytes()
    seconds: dict[str, list[float]] = {"bare, all cores": [], "bare, worker per core": [], "dump": []}
    for _ in range(arguments.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            writer = CacheWriter(Path(folder), spec, tokenizer)
            batches = [rows for shard in writer.missing_shards() for rows in batches_of(shard, config.batch_windows)]
            for name, times in seconds.items():
                started = time.perf_counter()
                if name == "dump":
                    with Progress("dump", positions, "positions") as progress:
                        write_missing_shards(writer, teacher, {"train": windows}, config, progress)
                    writer.finish()
                else:
                    bare_forward(teacher, windows, batches, workers="worker" in name)
                times.append(time.perf_counter() - started)
    measured = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    result: dict[str, Any] = {
        "positions_per_round": positions,
        "profile": spec.profile.model_dump(),
        "hidden_layers": list(config.hidden_layers),
        "positions_per_s": {name: positions / statistics.median(values) for name, values in measured.items()},
        "dump_over": {
            name: sorted(bare / dump for bare, dump in zip(values, measured["dump"], strict=True))
            for name, values in measured.items()
            if name != "dump"
        },
        "rounds": arguments.rounds,
        "environment": environment(),
    }
    rows = []
    for name, ratios in result["dump_over"].items():
        speeds = [f"{result['positions_per_s'][key]:,.0f}" for key in (name, "dump")]
        rows.append([name, *speeds, f"{statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}"])
    titles = ["forward pass", "positions/s", "dump, positions/s", "dump / forward: median, min to max"]
    result["markdown"] = text_table([titles, *rows])
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(result["markdown"])


if __name__ == "__main__":
    main()
