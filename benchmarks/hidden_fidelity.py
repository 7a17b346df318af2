"""Bytes of cached hidden states against what is lost of them, over codings and their settings.

    python -m benchmarks.hidden_fidelity [--config configs/demo.toml] [--run-dir runs/demo] [--layers 1 2]

Needs the data, teacher and cache of a run. Tables and steps are fitted on windows of the train split, as a dump does,
and everything is measured on 48 windows of the validation split; the student is the teacher with 15% noise. Bytes are
those of a cache's chunks, and tables spread over the run's cache, per layer and position of the text, also of positions
that a stride leaves out. Speed is that of one core, from the compressed chunks of all layers to float32 states, the
best of three. Writes benchmarks/results/hidden_fidelity.json.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from benchmarks.environment import environment
from tristill.cache.hidden import Float16Hidden, HiddenSpec, Int8Hidden, Reduction
from tristill.cache.layout import default_windows_per_chunk
from tristill.cache.manifest import load_manifest
from tristill.cache.parts import Part, PartCoder
from tristill.cache.profiles.profile import Place
from tristill.pipeline.config import load_config
from tristill.pipeline.results import text_table
from tristill.stages.data.tokenized import split_windows
from tristill.stages.dump.calibrate import as_stored
from tristill.stages.dump.forward import sample_hidden
from tristill.stages.dump.hidden import hidden_arrays
from tristill.stages.dump.hidden_calibrate import hidden_sample
from tristill.stages.dump.hidden_config import HiddenSettings, TransformHiddenSettings
from tristill.stages.dump.hidden_fit import FittedHidden, HiddenSample, fit_hidden, measure_hidden
from tristill.stages.dump.prepare import calibration_sample
from tristill.stages.fidelity.measure import near_student
from tristill.stages.models.checkpoint import load_model
from tristill.stages.targets.hidden import HiddenStates, HiddenTransforms

RESULTS = Path(__file__).parent / "results" / "hidden_fidelity.json"
ROUNDS = 3
WINDOWS = 48


def settings_to_measure() -> Iterator[tuple[str, HiddenSettings]]:
    yield "float16", HiddenSettings(coding=Float16Hidden())
    yield "int8", HiddenSettings(coding=Int8Hidden())
    yield "int8, stride 2", HiddenSettings(coding=Int8Hidden(), stride=2)
    for kind in ("pca", "seeded"):
        coding = Int8Hidden(reduction=Reduction.model_validate({"kind": kind, "width": 128}))
        yield f"int8, {kind} to 128", HiddenSettings(coding=coding)
    for error in (0.02, 0.05, 0.1):
        for delta in (False, True):
            coded = TransformHiddenSettings(relative_error=error, delta=delta)
            name = f"transform, error {error:g}{', delta' if delta else ''}"
            yield name, HiddenSettings(coding=coded)
    yield "transform, error 0.05, delta, stride 2", HiddenSettings(coding=TransformHiddenSettings(), stride=2)


def reading_speed(fitted: FittedHidden, sample: HiddenSample) -> float:
    """Positions/s of all layers together, from compressed chunks to states."""
    spec, windows = fitted.spec, sample.measure
    num_windows, context_length = windows.input_ids_PT.shape
    arrays = hidden_arrays(
        spec, HiddenTransforms(spec, fitted.tables, torch.device("cpu")), windows.states, windows.input_ids_PT
    )
    states = HiddenStates(spec, fitted.tables, torch.device("cpu"))
    parts = [spec.part(layer, sample.vocab_size, context_length) for layer in spec.layers]
    coders = {part.name: PartCoder(part, fitted.tables) for part in parts if part.is_coded}
    per_chunk = min(default_windows_per_chunk(context_length), num_windows)
    rows = slice(0, per_chunk)
    place = Place("train", 0, per_chunk, context_length)
    frames: dict[str, bytes] = {}
    for part in parts:
        given = {array.name: as_stored(arrays[array.name][rows].numpy(), array) for array in part.arrays}
        stored = {part.name: coders[part.name].encode(given, place)} if part.is_coded else given
        frames |= {name: zstandard.ZstdCompressor(3).compress(content) for name, content in stored.items()}

    def read() -> None:
        found = {name: zstandard.ZstdDecompressor().decompress(frame) for name, frame in frames.items()}
        values: dict[str, np.ndarray] = {}
        for part in parts:
            values |= decoded(part, coders, found, place)
        by_layer = {layer: torch.from_numpy(values[f"hidden_{layer}"]) for layer in spec.layers}
        scales = {layer: torch.from_numpy(values[f"hidden_{layer}_scale"]) for layer in spec.layers if spec.has_scales}
        states.states(by_layer, scales, windows.input_ids_PT[rows], spec.layers)

    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - started)
    return place.num_positions / min(seconds)


def decoded(part: Part, coders: dict[str, PartCoder], content: dict[str, bytes], place: Place) -> dict[str, np.ndarray]:
    if part.is_coded:
        return coders[part.name].decode(np.frombuffer(content[part.name], np.uint8), place)
    return {
        array.name: np.frombuffer(bytearray(content[array.name]), array.dtype).reshape(place.num_windows, *array.shape)
        for array in part.arrays
    }


def coded_layers(spec: HiddenSpec) -> list[dict[str, Any]]:
    """Steps and ranks of a transform."""
    return [dict(layer) for layer in getattr(spec.coding, "coded", ())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    layers = tuple(sorted(arguments.layers))
    config = load_config(arguments.config).cache.model_copy(update={"hidden_layers": layers})
    teacher = load_model(arguments.run_dir / "teacher").eval()
    windows = split_windows(arguments.run_dir / "data", "train")
    spec = load_manifest(config.dir or arguments.run_dir / "cache").spec
    total = sum(spec.num_positions(split) for split in spec.splits)
    chosen = calibration_sample(config, teacher, windows, spec.splits["train"].num_windows, total)
    sample = hidden_sample(config, teacher, windows, chosen)
    held_out = split_windows(arguments.run_dir / "data", "validation")
    measured = [
        sample_hidden(model, held_out, "validation", list(range(WINDOWS)), 16, config.precision, layers)
        for model in (teacher, near_student(teacher))
    ]
    other = replace(sample, measure=measured[0], student=measured[1])
    rows: list[dict[str, Any]] = []
    for name, settings in settings_to_measure():
        fitted = fit_hidden(settings, sample)
        points = [point.model_dump() for point in measure_hidden(fitted, other)]
        speed = reading_speed(fitted, other)
        coded = coded_layers(fitted.spec)
        rows.append({"coding": name, "layers": points, "coded": coded, "read_positions_per_s": speed})
        print(" | ".join(cells(rows[-1])), flush=True)
    titles = ["coding"]
    titles += [f"layer {layer}: bytes, relative error, degrees" for layer in layers]
    titles += ["bytes/layer/position, tables included", "positions/s read, one core"]
    result = {
        "width": teacher.config.width,
        "measured_positions": other.measure.input_ids_PT.numel(),
        "fitted_positions": sample.fit.input_ids_PT.numel(),
        "cache_positions": total,
        "rows": rows,
        "environment": environment(),
        "markdown": text_table([titles, *(cells(row) for row in rows)]),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(result["markdown"])


def cells(row: dict[str, Any]) -> list[str]:
    points = row["layers"]
    each = [
        f"{point['bytes_per_position']:.1f}, {point['relative_error']:.2%}, {point['angle_deg']:.2f}"
        for point in points
    ]
    mean = sum(point["bytes_per_position"] + point["table_bytes_per_position"] for point in points) / len(points)
    return [row["coding"], *each, f"{mean:.1f}", f"{row['read_positions_per_s']:,.0f}"]


if __name__ == "__main__":
    main()
