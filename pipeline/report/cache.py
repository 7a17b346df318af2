"""What was kept of the teacher, and how many bytes it takes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tristill.cache import CacheError, CacheSpec, open_cache
from tristill.cache.layout import MANIFEST_NAME
from tristill.pipeline.cache_info import cache_details, cache_info
from tristill.pipeline.cache_info_text import INFINITE_KL
from tristill.pipeline.report.drawing import Line, bars, histogram, lines
from tristill.pipeline.report.run import Run, mapping
from tristill.pipeline.report.section import Block, Entry, Figure, Heading, Missing, Section, Table, Text
from tristill.pipeline.units import bytes_text, count_text

TEMPERATURES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0)
_MOST_BARS = 12


def cache_section(run: Run) -> Section:
    """Every cache of the run: one, or one for each link of a chain."""
    blocks: list[Block] = []
    names = run.workspace.config.link_names
    for name in names:
        link = run.workspace.link(name)
        prefix = f"{name}-" if len(names) > 1 else ""
        if len(names) > 1:
            blocks.append(Heading(f"Of {link.taught_by or 'the teacher'}, for {name}"))
        blocks += _of_cache(link.cache, prefix, "" if name not in names[:-1] else f" --name {name}")
    return Section("cache", "Cache" if len(names) == 1 else "Caches", blocks)


def cache_size(folder: Path) -> tuple[float, int] | None:
    """(bytes per position, bytes in all) on disk; None if there is no cache that can be read."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        found = cache_info(folder)
    except CacheError:
        return None
    return found["bytes_per_position"]["on disk"], found["file_bytes"]


def _of_cache(folder: Path, prefix: str, option: str) -> list[Block]:
    if not (folder / MANIFEST_NAME).is_file():
        return [
            Missing(f"No cache is there; run tristill dump-logits{option}. Students with online targets need none.")
        ]
    try:
        info = cache_info(folder)
    except CacheError as exc:
        return [Missing(str(exc))]
    found: list[Block] = [Text(_story(info)), _bytes(info, prefix)]
    details = cache_details(folder)
    found += [figure for key in _HISTOGRAMS if (figure := _histogram(details["sample"], key, prefix))]
    if details["sample_error"]:
        found.append(Missing(f"Histograms are left out: {details['sample_error']}"))
    partition = _partition(folder, prefix)
    found += [block for block in partition if isinstance(block, Figure)]
    found += fidelity_blocks(info["calibration"], prefix)
    return [*found, *(block for block in partition if not isinstance(block, Figure))]


def _story(info: Mapping[str, Any]) -> str:
    spec, per_position = info["spec"], info["bytes_per_position"]
    positions = sum(info["positions"].values())
    full = 4 * spec["vocab_size"]
    profile = spec["profile"]
    text = (
        f"The profile is {profile['kind']}: {count_text(positions)} positions in {bytes_text(info['file_bytes'])}, "
        f"{per_position['on disk']:.1f} bytes per position. All logits in FP32 would take {full:,}, "
        f"{full / per_position['on disk']:,.0f} times as many."
    )
    if hidden := mapping(spec["hidden"]):
        text += f" Hidden states of layers {', '.join(map(str, hidden.get('layers', ())))} are kept beside them."
    return text


def _bytes(info: Mapping[str, Any], prefix: str) -> Figure:
    sizes = {name: size for name, size in info["bytes_per_position"].items() if name != "on disk"}
    ordered = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    shown = ordered[:_MOST_BARS]
    if ordered[_MOST_BARS:]:
        shown.append((f"{len(ordered) - _MOST_BARS} more", sum(size for _, size in ordered[_MOST_BARS:])))
    total = info["bytes_per_position"]["on disk"]
    largest, size = shown[0]
    return Figure(
        f"{prefix}cache-bytes",
        "Where the bytes go",
        bars(
            [name for name, _ in shown],
            [size for _, size in shown],
            [f"{size:.2f}" for _, size in shown],
            f"{prefix}cache-bytes",
            "bytes per position",
        ),
        f"Compressed bytes on disk over all positions, by data set. {largest} takes {size:.2f} of {total:.2f}; what "
        "the bars do not add up to are the files' own headers.",
    )


_HISTOGRAMS = {
    "head_mass": (
        "Mass of the head",
        "probability in the head",
        (
            "How much of the teacher's probability lies in the entries kept one by one; the rest is known "
            "only as a tail. The further right, the more a student learns exactly."
        ),
        "{:.1%}",
    ),
    "entropy_nats": (
        "How sure the teacher is",
        "entropy of the teacher, nats",
        (
            "Entropy of the teacher's distribution at the temperature of the dump. Positions at the left are nearly "
            "certain; those at the right teach the most."
        ),
        "{:.2f} nats",
    ),
}


def _histogram(sample: Mapping[str, Any] | None, key: str, prefix: str) -> Figure | None:
    if sample is None or not sample[key]:
        return None
    title, x_label, caption, form = _HISTOGRAMS[key]
    name = f"{prefix}{key.replace('_', '-')}"
    found = sample[key]
    return Figure(
        name,
        title,
        histogram(found["edges"], found["counts"], name, x_label, "share of positions"),
        f"{caption} Mean {form.format(found['mean'])}, over {count_text(sample['positions'])} positions of "
        f"{sample['split']}.",
    )


def _partition(folder: Path, prefix: str) -> list[Block]:
    from tristill.stages.fidelity.partition import log_partition

    try:
        cache = open_cache(folder)
        try:
            curve = log_partition(cache, TEMPERATURES)
        finally:
            cache.close()
    except CacheError as exc:
        return [Missing(f"The log-partition curve is left out: {exc}")]
    if curve is None:
        return [Text(f"There is no log-partition curve: {_why_no_curve(cache.spec)}.")]
    if len(curve.points) == 1:
        point = curve.points[0]
        return [
            Text(
                f"Of the log-partition curve it knows temperature {point.temperature:g} alone: there log Z less "
                f"the largest logit is {point.mean_nats:.2f} nats on average, and {point.low_nats:.2f} to "
                f"{point.high_nats:.2f} for the middle 80% of {count_text(curve.positions)} positions of {curve.split}."
            )
        ]
    taus = [point.temperature for point in curve.points]
    band = [point.low_nats for point in curve.points], [point.high_nats for point in curve.points]
    mean = Line(Entry("mean, and the middle 80% of positions", "s1"), taus, [p.mean_nats for p in curve.points], band,
                has_markers=True)  # fmt: skip
    name = f"{prefix}log-partition"
    found: list[Block] = [
        Figure(
            name,
            "Log-partition curve",
            lines([mean], name, "temperature", "log Z - largest logit, nats", log_x=True),
            "The log of the partition function at each temperature, less the largest logit over the temperature: 0 "
            f"where one token has all the mass, {math.log(cache.spec.vocab_size):.2f} where all are alike. "
            f"{_known(taus)} Over {count_text(curve.positions)} positions of {curve.split}.",
            [mean.entry],
        )
    ]
    masses = [(point.temperature, point.head_mass) for point in curve.points if point.head_mass is not None]
    if len(masses) > 1:
        head = Line(Entry("mean mass of the head", "s3"), [tau for tau, _ in masses], [mass for _, mass in masses],
                    has_markers=True)  # fmt: skip
        name = f"{prefix}head-mass-by-temperature"
        at_one = next((f" At temperature 1 it is {mass:.1%}." for tau, mass in masses if tau == 1), "")
        found.append(
            Figure(
                name,
                "Head and temperature",
                lines([head], name, "temperature", "probability in the head", log_x=True, has_shares=True),
                "What the entries of the head weigh at each temperature: the hotter, the more lies in the tail."
                + at_one,
                [head.entry],
            )
        )
    return found


def _why_no_curve(spec: CacheSpec) -> str:
    if spec.is_masked and spec.profile.kind != "sampled":
        return "the windows that were looked at have no position that counts"
    return "the profile keeps draws, or a head alone, which know no partition function"


def _known(temperatures: Sequence[float]) -> str:
    if temperatures == list(TEMPERATURES):
        return "The profile knows every temperature."
    return f"The profile knows the temperatures that it declares: {', '.join(f'{tau:g}' for tau in temperatures)}."


def fidelity_blocks(calibration: Mapping[str, Any] | None, prefix: str) -> list[Block]:
    """Gradient angles that the dump measured: a table for one setting, a plot for a curve of them."""
    if not calibration or not calibration["points"]:
        return []
    points, chosen = calibration["points"], calibration["chosen"]
    temperatures = list(points[chosen or 0]["angle_deg"])
    if len(points) == 1:
        point = points[0]
        rows = [
            (tau, f"{point['angle_deg'][tau]:.2f}", f"{point['norm_ratio'][tau]:.3f}",
             "infinite" if point["kl_nats"][tau] is None else f"{point['kl_nats'][tau]:.3f}")
            for tau in temperatures
        ]  # fmt: skip
        caption = (
            f"What the dump measured on {calibration['positions']:,} positions: the gradient of the distillation loss "
            "from cached beside full targets, its angle and length, and the KL between them."
        )
        if None in point["kl_nats"].values():
            caption += f" {INFINITE_KL}"
        return [
            Table(
                ("temperature", "angle, degrees", "norm ratio", "KL, nats"),
                rows,
                caption,
                title="Truth of the gradient",
            )
        ]
    found = []
    for place, tau in enumerate(temperatures):
        known = sorted((p["bytes_per_position"], p["angle_deg"][tau]) for p in points if tau in p["angle_deg"])
        entry = Entry(f"temperature {tau}", f"s{place % 8 + 1}", place % 8 >= 4)
        found.append(Line(entry, [x for x, _ in known], [y for _, y in known], has_markers=True))
    name = f"{prefix}fidelity"
    taken = f" Taken: {points[chosen]['bytes_per_position']:.1f} bytes per position." if chosen is not None else ""
    return [
        Figure(
            name,
            "Bytes against fidelity",
            lines(found, name, "bytes per position", "gradient angle, degrees", log_y=True),
            f"{len(points)} settings measured before the dump, by the angle between gradients from cached and from "
            f"full targets; lower is truer.{taken}",
            [line.entry for line in found],
        )
    ]
