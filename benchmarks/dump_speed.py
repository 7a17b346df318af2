"""What the dump costs beside the teacher's bare forward pass: positions/s of both, in one process, alternating.

    python -m benchmarks.dump_speed [--run-dir runs/demo] [--rounds 10]

Needs the data and teacher of a run (`make teacher`). The bare pass computes every logit and keeps none.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from cache import CacheWriter
from pipeline.config import load_config
from pipeline.results import text_table
from stages.data.tokenized import load_corpus, split_windows
from stages.data.tokens import TokenWindows
from stages.dump.config import DumpConfig
from stages.dump.dump import batches_of, cache_spec, write_missing_shards
from stages.losses.chunked_head import chunks
from stages.models.folder import load_model, model_fingerprint
from stages.models.transformer import Transformer
from stages.progress import Progress

RESULTS = Path(__file__).parent / "results" / "dump_speed.json"


@torch.inference_mode()
def bare_forward(teacher: Transformer, windows: TokenWindows, writer: CacheWriter, config: DumpConfig) -> None:
    for shard in writer.missing_shards():
        for rows in batches_of(shard, config.batch_windows):
            ids_BT1 = torch.from_numpy(windows.read(rows)).long()
            final_ND = teacher(ids_BT1[:, :-1]).final_BTD.flatten(0, 1)
            for part in chunks(len(final_ND), teacher.vocab_size):
                final_ND[part] @ teacher.head_weight.T


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
    seconds: dict[str, list[float]] = {"bare": [], "dump": []}
    for _ in range(arguments.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            writer = CacheWriter(Path(folder), spec, tokenizer)
            started = time.perf_counter()
            bare_forward(teacher, windows, writer, config)
            between = time.perf_counter()
            with Progress("dump", positions, "positions") as progress:
                write_missing_shards(writer, teacher, {"train": windows}, config, progress)
            writer.finish()
            seconds["bare"].append(between - started)
            seconds["dump"].append(time.perf_counter() - between)
    ratios = [bare / dump for bare, dump in zip(seconds["bare"][1:], seconds["dump"][1:], strict=True)]
    result: dict[str, Any] = {
        "positions_per_round": positions,
        "profile": spec.profile.model_dump(),
        "hidden_layers": list(config.hidden_layers),
        "bare_positions_per_s": positions / statistics.median(seconds["bare"][1:]),
        "dump_positions_per_s": positions / statistics.median(seconds["dump"][1:]),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": arguments.rounds,
        "environment": environment(),
    }
    result["markdown"] = text_table(
        [
            ["bare forward, positions/s", "dump, positions/s", "dump / bare: median, min to max"],
            [
                f"{result['bare_positions_per_s']:,.0f}",
                f"{result['dump_positions_per_s']:,.0f}",
                f"{result['ratio_median']:.2f}, {result['ratio_min']:.2f} to {result['ratio_max']:.2f}",
            ],
        ]
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(result["markdown"])


if __name__ == "__main__":
    main()
