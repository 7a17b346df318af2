"""Bytes against fidelity of every profile and of the field's codecs, on held-out positions of two teachers.

    python -m benchmarks.cache_fidelity [--run-dirs runs/demo runs/second]

Needs two finished runs: the demo's, and that of benchmarks/second.toml (another width and vocabulary), each with its
student `no-teacher`. Angle and norm ratio are of the gradient of forward KL in the student's output matrix, summed
over the first 1,024, 4,096 and 12,288 positions of the validation split, from cached against from full targets;
kl_nats is the mean KL(p || p cached). Students: `trained` on the labels alone, and `near`, the teacher with 15%
noise. Tables and models are fitted on the train split and their bytes spread over the run's cache. Writes
benchmarks/results/cache_fidelity.json and docs/cache_fidelity.svg.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.peers import polynomial, random_sampling, renormalised
from tristill.cache.manifest import load_manifest
from tristill.cache.parts import Part, PartCoder
from tristill.cache.profiles.heads import HeadSize
from tristill.cache.profiles.profile import Need
from tristill.cache.profiles.sampled import SampledProfile
from tristill.cache.profiles.topk import TopKProfile
from tristill.pipeline.config import load_config
from tristill.pipeline.results import text_table
from tristill.stages.data.tokenized import split_windows
from tristill.stages.data.tokens import TokenWindows
from tristill.stages.dump.calibrate import Fitter, Sample, as_given, knobs
from tristill.stages.dump.config import DenseSettings, ProfileSettings, TransformSettings
from tristill.stages.dump.extract import TeacherPositions, target_arrays
from tristill.stages.dump.forward import sample_positions
from tristill.stages.dump.prepare import calibration_sample
from tristill.stages.fidelity.measure import FeaturePairs, compare, gradient, mean_divergence, near_student
from tristill.stages.losses.target import ComputedTargets, Targets
from tristill.stages.models.checkpoint import load_model
from tristill.stages.models.transformer import Transformer
from tristill.stages.targets.stored import make_targets

RESULTS = Path(__file__).parent / "results" / "cache_fidelity.json"
PLOT = Path(__file__).parent.parent / "docs" / "cache_fidelity.svg"
COUNTS = (1024, 4096, 12_288)
TEMPERATURES = (1.0, 2.0, 5.0)
_INFINITE_NATS = 1e6


def settings_to_measure() -> Iterator[ProfileSettings]:
    """Every profile at several settings."""
    for num_draws in (5, 12, 22, 50):
        yield SampledProfile(draws=num_draws)
        yield SampledProfile(draws=num_draws, draw="independent")
    for probability in (0.05, 0.02, 0.005):
        yield TopKProfile(head=HeadSize(probability=probability, max_entries=64), temperatures=TEMPERATURES)
    for tail in ("uniform", "nothing"):
        yield TopKProfile(head=HeadSize(max_entries=64), temperatures=TEMPERATURES, tail=tail)
    for step, probability, coded_above in (
        (1.0, 0.1, 0.1),
        (0.7, 0.05, 0.1),
        (0.5, 0.05, 0.1),
        (0.3, 0.05, 0.1),
        (0.3, 0.02, 0.1),
        (0.2, 0.02, 0.1),
        (0.12, 0.02, 0.05),
        (0.08, 0.02, 0.05),
        (0.05, 0.01, 0.05),
    ):
        head = HeadSize(probability=probability)
        yield TransformSettings(step=step, head=head, coded_above=coded_above)
        if step in (0.5, 0.2, 0.12):
            yield TransformSettings(step=step, head=head, coded_above=coded_above, dither=False)
    yield DenseSettings()


class Bench:
    """One teacher with its two students."""

    def __init__(self, run_dir: Path) -> None:
        self.name = run_dir.name
        config = load_config(run_dir / "config.toml").cache
        self._teacher = load_model(run_dir / "teacher").eval()
        spec = load_manifest(config.dir or run_dir / "cache").spec
        windows, held_out = split_windows(run_dir / "data", "train"), split_windows(run_dir / "data", "validation")
        total = sum(spec.num_positions(split) for split in spec.splits)
        sample = calibration_sample(config, self._teacher, windows, spec.splits["train"].num_windows, total)
        rows = list(range(COUNTS[-1] // held_out.context_length))
        self.positions = sample_positions(self._teacher, held_out, "validation", rows, 16, "float32")
        students = {"trained": load_model(run_dir / "students" / "no-teacher"), "near": near_student(self._teacher)}
        self._students = {name: features(student.eval(), held_out, rows) for name, student in students.items()}
        self._fitter = Fitter(Sample(sample.fit, self.positions, self._students["near"], "near", total))
        self._full = ComputedTargets(self.positions.final_ND, self.positions.head_VD)
        self._full_gradients = {
            (name, tau): self._gradients(student, self._full, tau)
            for name, student in self._students.items()
            for tau in TEMPERATURES
        }

    @staticmethod
    def _gradients(student: FeaturePairs, targets: Targets, tau: float) -> list[torch.Tensor]:
        """Sums over the first COUNTS positions."""
        edges = (0, *COUNTS)
        parts = [gradient(student, targets, tau, slice(*edge)) for edge in zip(edges, COUNTS, strict=False)]
        return list(torch.stack(parts).cumsum(dim=0))

    def rows_of(
        self,
        profile: str,
        settings: dict[str, Any],
        targets: Targets,
        num_bytes: float,
        speeds: dict[str, float | None],
        served: tuple[float, ...] = TEMPERATURES,
    ) -> Iterator[dict[str, Any]]:
        """One row per student and number of positions."""
        kl = {
            f"{tau:g}": mean_divergence(targets, self._full, tau, COUNTS[-1]) if tau in served else None
            for tau in TEMPERATURES
        }
        kl = {tau: None if value is None or value > _INFINITE_NATS else value for tau, value in kl.items()}
        for name, student in self._students.items():
            found = {
                tau: [
                    compare(cached, full)
                    for cached, full in zip(
                        self._gradients(student, targets, tau), self._full_gradients[name, tau], strict=True
                    )
                ]
                for tau in served
            }
            for place, count in enumerate(COUNTS):
                yield {
                    "profile": profile,
                    "settings": settings,
                    "teacher": self.name,
                    "student": name,
                    "positions": count,
                    "bytes_per_position": num_bytes,
                    "angle_deg": {f"{tau:g}": found[tau][place][0] if tau in found else None for tau in TEMPERATURES},
                    "norm_ratio": {f"{tau:g}": found[tau][place][1] if tau in found else None for tau in TEMPERATURES},
                    "kl_nats": kl,
                    **speeds,
                }

    def measure(self, settings: ProfileSettings) -> Iterator[dict[str, Any]]:
        """A profile of ours, through its coder and back."""
        fitted = self._fitter.fit(settings)
        vocab_size = len(self.positions.head_VD)
        served = tuple(t for t in TEMPERATURES if not fitted.profile.unserved(Need("forward_kl", t), vocab_size))
        num_bytes = self._fitter.measure(fitted, ()).bytes_per_position
        arrays = target_arrays(fitted.profile, fitted.tables, self.positions)
        given = as_given(arrays, fitted.profile, self.positions)
        stored, speeds = timed_round_trip(fitted.profile, fitted.tables, given, self.positions)
        flat = {
            name: torch.from_numpy(np.ascontiguousarray(array)).flatten(0, 1)
            for name, array in {**stored, "teacher_entropy": arrays["teacher_entropy"] / np.float32(8)}.items()
        }
        make = make_targets(fitted.profile, fitted.tables, vocab_size, torch.device("cpu"))
        targets = make(flat, self.positions.input_ids_N)
        yield from self.rows_of(fitted.profile.kind, knobs(fitted.profile), targets, num_bytes, speeds, served)

    def measure_peers(self) -> Iterator[dict[str, Any]]:
        """What the field does, on the same logits."""
        logits_NV = self.positions.logits(slice(None))
        peers = [random_sampling(logits_NV, 22), random_sampling(logits_NV, 50)]
        peers += [renormalised(logits_NV, 16), renormalised(logits_NV, 50), polynomial(logits_NV, 50)]
        nothing = {"encode_positions_per_s": None, "decode_positions_per_s": None}
        for peer in peers:
            yield from self.rows_of(f"peer: {peer.name}", {}, peer.targets, peer.bytes_per_position, nothing)


def features(model: Transformer, windows: TokenWindows, rows: list[int]) -> FeaturePairs:
    positions = sample_positions(model, windows, "validation", rows, 16, "float32")
    return FeaturePairs(positions.final_ND, positions.head_VD)


def timed_round_trip(
    profile: Any, tables: dict[str, np.ndarray], given: dict[str, np.ndarray], positions: TeacherPositions
) -> tuple[dict[str, np.ndarray], dict[str, float | None]]:
    """The arrays as a reader gets them, and positions/s of coder and decoder on one core, the best of three."""
    if profile.make_coder is None:
        return given, {"encode_positions_per_s": None, "decode_positions_per_s": None}
    vocab_size, place = len(positions.head_VD), positions.place
    part = Part(
        "target",
        profile.arrays(vocab_size, place.context_length),
        profile.models(vocab_size),
        profile.tables(vocab_size),
        profile.make_coder,
    )
    coder = PartCoder(part, {f"target.{name}": table for name, table in tables.items()})
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(3):
        started = time.perf_counter()
        payload = coder.encode(given, place)
        seconds["encode"].append(time.perf_counter() - started)
        started = time.perf_counter()
        stored = coder.decode(np.frombuffer(payload, np.uint8), place)
        seconds["decode"].append(time.perf_counter() - started)
    count = place.num_positions
    return stored, {f"{name}_positions_per_s": count / min(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dirs", type=Path, nargs="+", default=[Path("runs/demo"), Path("runs/second")])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for run_dir in arguments.run_dirs:
        bench = Bench(run_dir)
        for settings in settings_to_measure():
            rows += bench.measure(settings)
            print(row_text(rows[-1]), flush=True)
        rows += bench.measure_peers()
    shown = [row for row in rows if row["teacher"] == rows[0]["teacher"] and is_in_short_table(row)]
    result = {"rows": rows, "environment": environment(), "markdown": table(shown)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows)
    print(table(rows))


def is_in_short_table(row: dict[str, Any]) -> bool:
    """Whether docs/measured.md shows it."""
    settings = row["settings"]
    match row["profile"]:
        case "sampled":
            return settings["draw"] == "systematic" and settings["draws"] != 22
        case "topk":
            return settings["tail"] == "bucket"
        case "transform":
            return settings["dither"] and settings["step"] in (0.5, 0.3, 0.2, 0.12)
    return True


def label(row: dict[str, Any]) -> str:
    """A row's profile with the settings that tell it from its neighbours."""
    settings = row["settings"]
    match row["profile"]:
        case "sampled":
            return f"sampled, {settings['draws']} {settings['draw']} draws"
        case "topk":
            return f"topk, p >= {settings['head.probability']}, {settings['tail']}"
        case "transform":
            dither = "" if settings["dither"] else ", no dither"
            return f"transform, step {settings['step']}, p >= {settings['head.probability']}{dither}"
    return str(row["profile"])


def row_text(row: dict[str, Any]) -> str:
    angles = " / ".join("-" if angle is None else f"{angle:.1f}" for angle in row["angle_deg"].values())
    return f"{row['teacher']}: {label(row)}, {row['student']}: {row['bytes_per_position']:.1f} B, {angles} degrees"


def table(rows: list[dict[str, Any]]) -> str:
    """Angles at 12,288 positions; both students of a teacher on one line."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["positions"] != COUNTS[-1]:
            continue
        angles = " / ".join("-" if angle is None else f"{angle:.1f}" for angle in row["angle_deg"].values())
        line = lines.setdefault((row["teacher"], label(row)), [f"{row['bytes_per_position']:.1f}"])
        line.append(angles)
    titles = [
        "teacher",
        "targets",
        "bytes/position",
        "trained: degrees at tau 1 / 2 / 5",
        "near: degrees at tau 1 / 2 / 5",
    ]
    return text_table([titles, *([*key, *cells] for key, cells in lines.items())])


def plot(rows: list[dict[str, Any]]) -> None:
    """Bytes against angle, one panel per temperature and student, of the first teacher."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "tristill"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(TEMPERATURES), figsize=(13, 7), sharex=True, sharey=True)
    for line, student in enumerate(("trained", "near")):
        for column, tau in enumerate(TEMPERATURES):
            panel = axes[line][column]
            for kind, marker in (("sampled", "o"), ("topk", "s"), ("transform", "D"), ("dense", "*"), ("peer", "x")):
                points = [
                    (row["bytes_per_position"], row["angle_deg"][f"{tau:g}"])
                    for row in rows
                    if row["profile"].startswith(kind)
                    and (row["student"], row["positions"], row["teacher"]) == (student, COUNTS[-1], rows[0]["teacher"])
                    and row["angle_deg"][f"{tau:g}"] is not None
                ]
                panel.plot(*zip(*points, strict=True), marker, label=kind) if points else None
            panel.set(xscale="log", yscale="log", title=f"{student} student, tau {tau:g}")
            panel.grid(visible=True, alpha=0.3)
    axes[0][0].legend()
    figure.supxlabel("bytes per position on disk")
    figure.supylabel("angle to the full gradient, degrees, 12,288 positions")
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
