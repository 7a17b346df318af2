"""What the dump costs beside the teacher's bare forward pass: positions/s of both, in one process, alternating.

    python -m benchmarks.dump_speed [--run-dir runs/demo] [--rounds 10]

Needs the data and teacher of a run (`make teacher`). The bare pass computes every logit and keeps none; every profile
dumps with its default settings, its tables made beforehand.
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
from pydantic import TypeAdapter

from benchmarks.environment import environment
from tristill.cache import CacheWriter, SplitName
from tristill.pipeline.config import load_config
from tristill.pipeline.results import text_table
from tristill.stages.data.tokenized import load_corpus, split_windows
from tristill.stages.data.tokens import TokenWindows
from tristill.stages.dump.config import DumpConfig, ProfileSettings
from tristill.stages.dump.dump import write_shards
from tristill.stages.dump.prepare import Prepared, prepare
from tristill.stages.losses.chunked_head import chunks
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.origin import model_fingerprint
from tristill.stages.models.transformer import Transformer
from tristill.stages.progress import Progress
from tristill.stages.threads import torch_threads

PROFILES = ("sampled", "topk", "transform", "dense", "plain_topk")
PROFILE_SETTINGS: TypeAdapter[Any] = TypeAdapter(ProfileSettings)
BARE = ("all cores", "worker per core")
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
    teacher, corpus = load_model(teacher_folder).eval(), load_corpus(data)
    splits: dict[SplitName, TokenWindows] = {
        "train": split_windows(data, "train"),
        "validation": split_windows(data, "validation"),
    }
    windows = splits["train"]
    tokenizer = (data / "tokenizer.json").read_bytes()
    prepared: dict[str, tuple[DumpConfig, Prepared]] = {}
    for kind in PROFILES:
        settings = config.model_copy(update={"profile": PROFILE_SETTINGS.validate_python({"kind": kind})})
        with tempfile.TemporaryDirectory() as folder:
            made = prepare(settings, corpus, teacher, model_fingerprint(teacher_folder), splits, Path(folder))
        spec = made.spec.model_copy(update={"splits": {"train": made.spec.splits["train"]}})
        prepared[kind] = (settings, Prepared(spec, made.tables_image))
    positions = spec.num_positions("train")
    batches = [list(range(first, first + 16)) for first in range(0, arguments.windows, 16)]
    seconds: dict[str, list[float]] = {name: [] for name in (*BARE, *prepared)}
    for _ in range(arguments.rounds + 1):
        for name, times in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                if name in prepared:
                    settings, made = prepared[name]
                    writer = CacheWriter(Path(folder), made.spec, tokenizer, made.tables_image)
                    with Progress("dump", positions, "positions") as progress:
                        missing = writer.missing_shards()
                        write_shards(writer, missing, teacher, {"train": windows}, settings, progress.advance)
                    writer.finish()
                else:
                    bare_forward(teacher, windows, batches, workers="worker" in name)
                times.append(time.perf_counter() - started)
    measured = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    ratios = {
        kind: {
            bare: sorted(one / own for one, own in zip(measured[bare], measured[kind], strict=True)) for bare in BARE
        }
        for kind in prepared
    }
    rows = [
        [kind, f"{positions / statistics.median(measured[kind]):,.0f}", *(spread(values) for values in found.values())]
        for kind, found in ratios.items()
    ]
    titles = ["profile", "dump, positions/s", *(f"over the forward pass, {bare}" for bare in BARE)]
    result: dict[str, Any] = {
        "positions_per_round": positions,
        "profiles": {kind: made.spec.profile.model_dump(mode="json") for kind, (_, made) in prepared.items()},
        "positions_per_s": {name: positions / statistics.median(values) for name, values in measured.items()},
        "dump_over": ratios,
        "rounds": arguments.rounds,
        "environment": environment(),
        "markdown": text_table([titles, *rows]),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(result["markdown"])


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}"


if __name__ == "__main__":
    main()
