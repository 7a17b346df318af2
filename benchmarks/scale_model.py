"""From what was measured on small caches to what very large runs take: stated assumptions, and the tables they give.

Every table of docs/scale.md is made here from benchmarks/results/scale.json and the constants below. Rates are of
positions, one GPU and one CPU core.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tristill.pipeline.results import text_table

VOCAB_SIZE = 131_072
CONTEXT_LENGTH = 4096
GPU_FLOPS = 989e12
"""NVIDIA H100 SXM, dense bfloat16, from its data sheet."""
DUMP_UTILISATION = 0.4
TRAIN_UTILISATION = 0.3
"""Lower: a ternary student quantises weights and activations in every step."""
STUDENT_PARAMETERS = 1e9
GPUS_PER_MACHINE = 8
GROWTH_PER_DOUBLED_WIDTH = 1.15
"""Of the bytes of transform coded targets: 11.6 and 13.4 at widths 128 and 256 (step 0.3, p >= 0.05, README)."""
ROUND_TRIP_S = 1e-3
"""Of a call to the metadata of a shared file system; opening makes one for every shard."""
GPUS = (8, 64, 1000)
RUNS = {"1 billion": 1e9, "1 trillion": 1e12}
SHARD_POSITIONS = (2**17, 2**20, 2**22, 2**24)
BUFFERED_POSITIONS = 3 * 64 * 8192
"""A reader holds at most three shuffle buffers of 64 chunks, decoded."""
PROFILES = ("sampled", "topk", "transform", "dense")

Measured = Mapping[str, Any]


@dataclass(frozen=True)
class Teacher:
    """A teacher by its parameters and width."""

    name: str
    parameters: float
    width: int

    @property
    def dump_rate(self) -> float:
        """Positions/s of one GPU: 2 FLOP per parameter."""
        return GPU_FLOPS * DUMP_UTILISATION / (2 * self.parameters)


TEACHERS = (Teacher("1B", 1e9, 2048), Teacher("70B", 70e9, 8192))
STUDENT_RATE = GPU_FLOPS * TRAIN_UTILISATION / (6 * STUDENT_PARAMETERS)
"""Positions/s of one GPU: 6 FLOP per parameter."""


def growth(profile: Measured, teacher: Teacher) -> float:
    """Bytes and work of a position's target at this teacher's width, over those at the width that was measured."""
    doublings: float = math.log2(teacher.width / profile["width"]) if profile["width"] else 0.0
    kind = profile["profile"]["kind"]
    if kind == "dense":
        return math.pow(2, doublings)
    return math.pow(GROWTH_PER_DOUBLED_WIDTH, doublings) if kind == "transform" else 1.0


def bytes_per_position(profile: Measured, teacher: Teacher) -> float:
    """Of ids, signals and target, without tables. Every id takes as many bits more as a larger vocabulary asks for."""
    id_bytes = math.log2(VOCAB_SIZE / profile["vocab_size"]) / 8
    target = profile["target_bytes"] * growth(profile, teacher)
    return float(profile["ids_bytes"] + profile["signals_bytes"] + target + id_bytes * (1 + profile["kept_ids"]))


def tables_bytes(profile: Measured, teacher: Teacher) -> float:
    """Once per cache, and in the memory of every rank, decompressed."""
    kind = profile["profile"]["kind"]
    if kind == "dense":
        return 4.0 * VOCAB_SIZE * teacher.width
    if kind == "transform":
        basis_rank: float = profile["profile"]["basis_rank"] * teacher.width / profile["width"]
        return 2 * 2.0 * VOCAB_SIZE * basis_rank
    return 4.0 * VOCAB_SIZE


def buffer_bytes(profile: Measured, teacher: Teacher) -> float:
    """Of a reader's shuffle buffers; ids take four bytes in place of two."""
    settings = profile["profile"]
    num_ids = 1 + (settings["head"]["max_entries"] if "head" in settings else settings.get("draws", 0))
    return float((profile["decoded_bytes"] * growth(profile, teacher) + 2 * num_ids) * BUFFERED_POSITIONS)


def tables(result: Measured) -> dict[str, str]:
    """Every table of the page by its name there."""
    profiles = {kind: result["profiles"][kind] for kind in PROFILES}
    verified_rate = result["verified_bytes_per_s"] / bytes_per_position(profiles["transform"], TEACHERS[0])
    record_bytes = max(found["manifest_bytes"] / int(count) for count, found in result["opening"].items())
    return {
        "measured": measured_table(profiles),
        "bytes": bytes_table(profiles, result["hidden_bytes_per_width"]),
        "assumptions": assumptions_table(),
        "time": time_table(result["tokenized_per_s"], verified_rate),
        "cores": cores_table(profiles),
        "memory": memory_table(profiles),
        "files": files_table(profiles["transform"], record_bytes, result["reading"]["1000"]["fetches"]),
        "opening": opening_table(result["opening"]),
        "reading": reading_table(result["reading"], profiles["transform"]),
    }


def assumptions_table() -> str:
    """What is not measured."""
    rows = {
        "vocabulary": f"{VOCAB_SIZE:,} ids; every id that is kept, and every input id, takes log2 of the ratio of "
        "vocabularies more bits than measured",
        "ids kept, signals": "as many and as large as of the demo's teacher; a better one is surer and keeps fewer",
        "width": "`dense` and hidden states grow with it, targets of `transform` by "
        f"{GROWTH_PER_DOUBLED_WIDTH - 1:.0%} for each doubling (11.6 and 13.4 bytes at 128 and 256), others do not",
        "teachers": ", ".join(f"{teacher.name}: width {teacher.width:,}" for teacher in TEACHERS),
        "student": f"{STUDENT_PARAMETERS / 1e9:g}B parameters, ternary, of either teacher's cache",
        "context": f"{CONTEXT_LENGTH:,} positions",
        "GPU": f"NVIDIA H100 SXM, {GPU_FLOPS / 1e12:.0f} TFLOP/s dense in bfloat16 by its data sheet, "
        f"{GPUS_PER_MACHINE} in a machine",
        "utilisation": f"{DUMP_UTILISATION:.0%} in the dump, {TRAIN_UTILISATION:.0%} in training",
        "work": "2 FLOP per parameter and position forward, 6 in training; attention's own products are left out",
    }
    return text_table([["of", "assumed"], *([name, text] for name, text in rows.items())])


def measured_table(profiles: Measured) -> str:
    """What all else is counted from."""
    rows = [["profile", "ids", "signals", "target", "ids kept", "tables, MB", "written/s, a core", "read/s, a core"]]
    rows += [
        [
            setting_text(found["profile"]),
            *(f"{found[name]:.2f}" for name in ("ids_bytes", "signals_bytes", "target_bytes")),
            f"{found['kept_ids']:.1f}" if found["kept_ids"] else "-",
            f"{found['tables_bytes'] / 1e6:.2f}",
            *(f"{found[f'{name}_positions_per_s']:,.0f}" for name in ("encode", "decode")),
        ]
        for found in profiles.values()
    ]
    return text_table(rows)


def setting_text(profile: Measured) -> str:
    """The setting in a few words."""
    match profile["kind"]:
        case "sampled":
            return f"sampled, {profile['draws']} draws"
        case "topk":
            return f"topk, p >= {profile['head']['probability']:g}"
        case "transform":
            return f"transform, step {profile['step']:g}, p >= {profile['head']['probability']:g}"
    return f"{profile['kind']}"


def bytes_table(profiles: Measured, hidden: Mapping[str, float]) -> str:
    """Per position and in all, by teacher."""
    titles = [
        title
        for teacher in TEACHERS
        for title in (f"{teacher.name}: bytes/position", "1 billion", "1 trillion", "tables, decompressed")
    ]
    rows = [["what", *titles]]
    for found in profiles.values():
        cells = []
        for teacher in TEACHERS:
            each = bytes_per_position(found, teacher)
            cells += [f"{each:,.1f}", *(size_text(each * count) for count in RUNS.values())]
            cells.append(size_text(tables_bytes(found, teacher)))
        rows.append([setting_text(found["profile"]), *cells])
    for coding, per_width in hidden.items():
        cells = []
        for teacher in TEACHERS:
            each = per_width * teacher.width
            cells += [f"{each:,.0f}", *(size_text(each * count) for count in RUNS.values()), "-"]
        rows.append([f"a hidden layer, {coding}", *cells])
    return text_table(rows)


def size_text(num_bytes: float) -> str:
    """In the largest decimal unit of which there is at least one."""
    for power, unit in ((15, "PB"), (12, "TB"), (9, "GB"), (6, "MB")):
        if num_bytes >= 10**power:
            return f"{num_bytes / 10**power:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def time_text(seconds: float) -> str:
    """In the largest unit of which there is at least one."""
    for unit_s, unit in ((365 * 86_400, "years"), (86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:,.3g} {unit}"
    return f"{seconds:.3g} s"


def memory_table(profiles: Measured) -> str:
    """Of every rank that reads: what it holds beside its model."""
    titles = [title for teacher in TEACHERS for title in (f"{teacher.name}: shuffle buffers, at most", "tables")]
    rows = [["profile", *titles]]
    for found in profiles.values():
        cells = [(buffer_bytes(found, teacher), tables_bytes(found, teacher)) for teacher in TEACHERS]
        rows.append([setting_text(found["profile"]), *(size_text(size) for pair in cells for size in pair)])
    return text_table(rows)


def time_table(tokenized_per_s: float, verified_per_s: float) -> str:
    """Of the dump, and of one epoch of a student; of what one process does, on the machine of the measurements."""
    rows = [["what", "positions", "positions/s, a GPU", "FLOP", "GPU hours", *(f"{count:,} GPUs" for count in GPUS)]]
    stages = [(f"dump, teacher {teacher.name}", 2 * teacher.parameters, teacher.dump_rate) for teacher in TEACHERS]
    stages.append(("one epoch of a 1B student", 6 * STUDENT_PARAMETERS, STUDENT_RATE))
    for label, flop, rate in stages:
        for name, count in RUNS.items():
            seconds = count / rate
            walls = [time_text(seconds / gpus) for gpus in GPUS]
            hours = f"{seconds / 3600:,.{1 if seconds < 360_000 else 0}f}"
            rows.append([label, name, f"{rate:,.0f}", f"{flop * count:.1e}", hours, *walls])
    for label, rate in (("tokenize, one process", tokenized_per_s), ("verify, 1B, one core", verified_per_s)):
        for name, count in RUNS.items():
            rows.append([label, name, f"{rate:,.0f}", "-", "-", time_text(count / rate), "-", "-"])
    return text_table(rows)


def cores_table(profiles: Measured) -> str:
    """Cores beside a GPU, and bytes through a machine of 8, at the GPU's full speed."""
    titles = [title for teacher in TEACHERS for title in (f"dump {teacher.name}: cores/GPU", "MB/s out of a machine")]
    titles += [
        title for teacher in TEACHERS for title in (f"student of {teacher.name}: cores/GPU", "MB/s into a machine")
    ]
    rows = [["profile", *titles]]
    for found in profiles.values():
        cells = []
        for rates, speed in ((tuple(t.dump_rate for t in TEACHERS), "encode"), ((STUDENT_RATE,) * 2, "decode")):
            for teacher, rate in zip(TEACHERS, rates, strict=True):
                cores = rate * growth(found, teacher) / found[f"{speed}_positions_per_s"]
                moved = rate * GPUS_PER_MACHINE * bytes_per_position(found, teacher)
                cells += [f"{cores:.2g}", f"{moved / 1e6:,.3g}"]
        rows.append([setting_text(found["profile"]), *cells])
    return text_table(rows)


def files_table(profile: Measured, record_bytes: float, fetches: float) -> str:
    """What the number of positions in a shard decides; `fetches` of every shard in an epoch of 1,000 ranks."""
    lost = ["a shard is dumped in: 1B, one GPU", f"70B, {GPUS_PER_MACHINE} GPUs"]
    titles = [title for name in RUNS for title in (f"{name}: files", "manifest")]
    rates = ["files/s written, 1B, 1,000 GPUs", "files/s read"]
    rows = [["shard_positions", *(f"file, {teacher.name}" for teacher in TEACHERS), *titles, *rates, *lost]]
    for positions in SHARD_POSITIONS:
        row = [f"2^{positions.bit_length() - 1}"]
        row += [size_text(positions * bytes_per_position(profile, teacher)) for teacher in TEACHERS]
        for count in RUNS.values():
            files = math.ceil(count / positions)
            row += [f"{files:,}", size_text(files * record_bytes)]
        row += [f"{1000 * rate / positions:,.0f}" for rate in (TEACHERS[0].dump_rate, STUDENT_RATE * fetches)]
        row += [time_text(positions / TEACHERS[0].dump_rate)]
        row += [time_text(positions / TEACHERS[1].dump_rate / GPUS_PER_MACHINE)]
        rows.append(row)
    return text_table(rows)


def opening_table(opening: Mapping[str, Measured]) -> str:
    """Of a rank of its own, without data."""
    rows = [
        [
            "shards",
            "manifest",
            "read and checked, s",
            "open_cache, s",
            "a call a shard at 1 ms, s",
            "first batch, s",
            "batch in mid-epoch, s",
            "fingerprint, s",
            "RSS, MiB",
        ]
    ]
    for count, found in opening.items():
        opened = "refused" if found["refused"] else f"{found['open_s']:.2f}"
        rows.append(
            [
                f"{int(count):,}",
                size_text(found["manifest_bytes"]),
                f"{found['manifest_s']:.2f}",
                opened,
                "-" if found["refused"] else f"{int(count) * ROUND_TRIP_S:,.0f}",
                *(f"{found[f'{name}_s']:.3f}" for name in ("first_batch", "mid_epoch")),
                f"{found['fingerprint_s']:.2f}",
                f"{found['start_mib']:.0f} to {found['fingerprint_mib']:.0f}",
            ]
        )
    return text_table(rows)


def reading_table(reading: Mapping[str, Measured], profile: Measured) -> str:
    """Of one epoch, by the number of ranks; bytes at a student's full speed, of a cache of the 1B teacher."""
    rows = [
        [
            "ranks",
            "windows in a batch",
            "different shards: a rank",
            "a machine of 8",
            "a machine, at once",
            "each shard is fetched, times",
            "the same, dealt in order",
            "MB/s into a machine",
            "positions decoded over used",
        ]
    ]
    per_machine = STUDENT_RATE * GPUS_PER_MACHINE * bytes_per_position(profile, TEACHERS[0])
    rows += [
        [
            f"{int(ranks):,}",
            f"{found['batch_windows']:,}",
            f"{found['shards_per_rank']:,.0f}",
            f"{found['shards_per_machine']:,.0f}",
            f"{found['at_once']}",
            f"{found['fetches']:.1f}",
            f"{found['fetches_in_order']:.1f}",
            f"{per_machine * found['fetches'] / 1e6:,.0f}",
            f"{found['decoded']:.2f}",
        ]
        for ranks, found in reading.items()
    ]
    return text_table(rows)
