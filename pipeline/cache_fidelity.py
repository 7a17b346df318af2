"""The tables of `tristill cache fidelity`."""

from typing import TYPE_CHECKING

from tristill.cache.calibration import Calibration
from tristill.pipeline.results import text_table

if TYPE_CHECKING:
    from tristill.stages.fidelity.cache import CacheFidelity


def fidelity_table(rows: "list[CacheFidelity]") -> str:
    """Measured now, on the validation split."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    lines = [
        [
            f"{row.temperature:g}",
            cell(row.angle_deg, "{:.2f}"),
            cell(row.norm_ratio, "{:.3f}"),
            cell(row.kl_nats, "{:.5f}"),
            f"{row.positions:,}",
        ]
        for row in rows
    ]
    text = text_table([["tau", "angle, degrees", "norm ratio", "KL, nats", "positions"], *lines])
    refusals = [f"tau {row.temperature:g}: {row.refused}" for row in rows if row.refused]
    return "\n".join([text, *refusals])


def calibration_table(calibration: Calibration) -> str:
    """Measured before the dump, on the train split; the chosen setting is marked."""
    if not calibration.points:
        return "calibration: nothing was measured"
    temperatures = sorted({tau for point in calibration.points for tau in point.angle_deg}, key=float)
    shown = [name for name in ("step", "rank", "draws", "head.probability") if name in calibration.points[0].settings]
    rows = [
        [
            "*" if place == calibration.chosen else "",
            *(str(point.settings[name]) for name in shown),
            f"{point.bytes_per_position:.2f}",
            *(f"{point.angle_deg[tau]:.2f}" if tau in point.angle_deg else "-" for tau in temperatures),
        ]
        for place, point in enumerate(calibration.points)
    ]
    titles = ["", *shown, "bytes/position", *(f"degrees at tau {tau}" for tau in temperatures)]
    target = f", for {calibration.target}" if calibration.target else ""
    return f"calibration on {calibration.positions:,} positions, {calibration.student}{target}:\n" + text_table(
        [titles, *rows]
    )
