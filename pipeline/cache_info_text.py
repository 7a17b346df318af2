"""What a cache holds, for people: cache_info and cache_details as text."""

from typing import Any

from tristill.cache.calibration import Calibration, FidelityPoint
from tristill.pipeline.results import text_table

_BAR_WIDTH = 40
INFINITE_KL = (
    "An infinite KL is what samples have, and no fault: a token that was not drawn has probability 0 there, though the "
    "teacher gives it some. What is learned from samples is right on average over the draws, as the angle says."
)


def cache_info_text(info: dict[str, Any]) -> str:
    """cache_info, with cache_details if they are in it."""
    spec = info["spec"]
    profile = ", ".join(f"{key} {_plain(value)}" for key, value in spec["profile"].items())
    positions = ", ".join(f"{count:,} {split}" for split, count in info["positions"].items())
    lines = [
        f"cache      {info['folder']} (format version {spec['format_version']})",
        f"profile    {profile}",
        f"hidden     {_plain(spec['hidden']) if spec['hidden'] else 'none'}",
        f"windows    {spec['context_length']} positions each, vocabulary {spec['vocab_size']:,}",
        f"positions  {positions}{_of_all(info)}",
        f"shards     {info['shards']}, {info['file_bytes']:,} bytes",
        f"teacher    {spec['teacher_fingerprint']}",
        f"tokenizer  {spec['tokenizer_fingerprint']}",
        *_provenance_lines(info.get("provenance")),
        "",
    ]
    rows = [[name, f"{value:.2f}"] for name, value in info["bytes_per_position"].items()]
    parts = ["\n".join(lines) + text_table([["dataset", "bytes/position"], *rows])]
    if info["calibration"]:
        parts.append(_calibration_text(Calibration.model_validate(info["calibration"])))
    if found := info.get("sample"):
        of = f"over {found['positions']:,} positions in {found['chunks']} chunks of {found['split']}"
        for name, unit in (("head_mass", ""), ("entropy_nats", " nats")):
            if found[name]:
                title = "mass of the head" if name == "head_mass" else "entropy of the teacher"
                parts.append(f"{title}, {of}: mean {found[name]['mean']:.3f}{unit}\n{_bars(found[name])}")
    if error := info.get("sample_error"):
        parts.append(f"no histograms: {error}")
    return "\n\n".join(parts)


def _of_all(info: dict[str, Any]) -> str:
    """Said of a masked cache: what its positions are a share of, and that sizes are per position that counts."""
    counted, every = sum(info["positions"].values()), sum(info["windows_positions"].values())
    return "" if counted == every else f" that count ({counted / every:.1%} of {every:,}); bytes are per one of these"


def _provenance_lines(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return []
    if "error" in record:
        return [f"made by    not known: {record['error']}"]
    took = f" in {record['elapsed_s']:,.0f} s" if record["elapsed_s"] else f", {record['status']}"
    versions = ", ".join(
        f"{name} {record['versions'][name]}" for name in ("tristill", "torch") if name in record["versions"]
    )
    return [f"made by    {record['command']}", f"           {versions}; recorded {record['recorded_at']}{took}"]


def _calibration_text(calibration: Calibration) -> str:
    """The target, and what the chosen point achieves by temperature."""
    head = f"calibration on {calibration.positions:,} positions; the student is {calibration.student}"
    target = (
        f"target     {calibration.target or 'none: settings as given'}, of {len(calibration.points)} points measured"
    )
    if calibration.chosen is None:
        return f"{head}\n{target}"
    point = calibration.points[calibration.chosen]
    settings = ", ".join(f"{key} {value}" for key, value in point.settings.items())
    rows = [[temperature, *_fidelity(point, temperature)] for temperature in point.angle_deg]
    table = text_table([["temperature", "angle, degrees", "norm ratio", "KL, nats"], *rows])
    note = "" if None not in point.kl_nats.values() else f"\n{INFINITE_KL}"
    return f"{head}\n{target}\nchosen     {settings}: {point.bytes_per_position:.2f} bytes/position\n{table}{note}"


def _fidelity(point: FidelityPoint, temperature: str) -> list[str]:
    kl_nats = point.kl_nats.get(temperature)
    kl_text = "infinite" if kl_nats is None else f"{kl_nats:.3g}"
    return [f"{point.angle_deg[temperature]:.3g}", f"{point.norm_ratio[temperature]:.3g}", kl_text]


def _bars(histogram: dict[str, Any]) -> str:
    edges, counts = histogram["edges"], histogram["counts"]
    total, largest = sum(counts), max(counts)
    return "\n".join(
        f"  {low:4.1f} to {high:4.1f} {count / total:7.2%} {'#' * round(_BAR_WIDTH * count / largest)}".rstrip()
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    )


def _plain(value: Any) -> str:
    """A setting as `a b, c d` within brackets, a list as `1/2`."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_plain(part)}" for key, part in value.items()) + ")"
    return "/".join(str(part) for part in value) if isinstance(value, list) else str(value)
