"""A plan as tables: what every step takes, what the cache takes on disk, and what happened since."""

from collections.abc import Iterator, Sequence

from tristill.pipeline.plan.compare import Comparison
from tristill.pipeline.plan.prediction import CachePrediction, Plan
from tristill.pipeline.results import text_table
from tristill.pipeline.units import bytes_text, seconds_text


def plan_text(plan: Plan) -> str:
    """The steps, then the caches."""
    rows = [["step", "positions", "time", "peak RSS, MiB", "disk", "from"]]
    for stage in plan.stages:
        time = "done" if stage.is_done else seconds_text(stage.elapsed_s)
        peak = f"{stage.peak_rss_mib:,.0f}" if stage.peak_rss_mib else "-"
        disk = "-" if stage.is_done else bytes_text(stage.disk_bytes)
        rows.append([stage.step, f"{stage.positions:,}", time, peak, disk, stage.basis])
    left = [stage for stage in plan.stages if not stage.is_done]
    total = [
        seconds_text(sum(stage.elapsed_s for stage in left)),
        f"{max((stage.peak_rss_mib for stage in left), default=0):,.0f}",
        bytes_text(sum(stage.disk_bytes for stage in left)),
    ]
    rows.append(["all that is to be done", "", *total, f"{plan.threads} threads, planned in {plan.planned_s:.0f} s"])
    caches = {**plan.stage_caches, "": plan.cache}
    warnings = [f"warning: {stage.step}: {refused}" for stage in left if (refused := stage.refused_exports)]
    tables = [text_table(rows), *(_cache_text(name, cache) for name, cache in caches.items())]
    return "\n\n".join([*tables, *warnings])


def _cache_text(name: str, cache: CachePrediction) -> str:
    title = f"cache of {name}" if name else "cache"
    positions = sum(cache.positions.values())
    if not positions:
        return f"{title}: {cache.basis}"
    rows = [[title, "bytes", "bytes/position"]]
    parts = [*cache.dataset_bytes.items()]
    parts += [("all files", cache.total_bytes)]
    rows += [[part, f"{num_bytes:,.0f}", f"{num_bytes / positions:.2f}"] for part, num_bytes in parts]
    by_split = ", ".join(f"{split} {count:,}" for split, count in cache.positions.items())
    return f"{text_table(rows)}\n{positions:,} positions in all windows ({by_split}); {cache.basis}"


def comparison_table(rows: Sequence[Comparison]) -> str:
    """Predicted beside what happened."""
    return text_table([["figure", "predicted", "happened", "happened / predicted"], *map(_compared, rows)])


def _compared(row: Comparison) -> list[str]:
    shown = {"s": seconds_text, "MiB": "{:,.0f} MiB".format, "bytes": bytes_text}.get(row.unit, "{:,.0f}".format)
    return [row.what, shown(row.predicted), shown(row.happened), f"{row.ratio:.2f}"]


def disk_lines(needed: dict[str, float], free: dict[str, float]) -> Iterator[str]:
    """What is needed and free at each place, and a warning where it does not suffice."""
    for place, num_bytes in needed.items():
        verdict = "" if num_bytes <= free[place] else ": NOT ENOUGH, free some, or use another place"
        left = bytes_text(free[place])
        yield f"disk of {place}: needs {bytes_text(num_bytes)} at most at once, {left} are free{verdict}"
