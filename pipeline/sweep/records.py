"""From the study's trials to results.json, results.csv and what is printed."""

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from tristill.cache.atomic import write_atomically
from tristill.pipeline.results import COLUMNS, text_table
from tristill.pipeline.sweep.config import SEED, SweepConfig
from tristill.pipeline.sweep.points import folder_name, in_words, short_keys, value_text, without_seed
from tristill.pipeline.sweep.results import SeedGroup, SweepResults, Trial

_STATES: dict[TrialState, Literal["complete", "pruned", "failed", "running", "waiting"]] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_TRAIN_COLUMNS = ("steps", "positions", "positions_per_s")
_MODEL_COLUMNS = ("parameters", "ternary_parameters", "packed_bytes")


def results_of(
    name: str, sweep: SweepConfig, trials: list[FrozenTrial], folder: Path, cache_fingerprint: str
) -> SweepResults:
    """What the study's trials say now; `folder` is the sweep's. The ledger is not in it."""
    found = tuple(_trial(trial, folder, cache_fingerprint) for trial in sorted(trials, key=lambda one: one.number))
    groups = _groups(sweep, found)
    return SweepResults(
        name=name,
        cache_fingerprint=cache_fingerprint,
        metric=sweep.metric,
        direction=sweep.direction,
        varied=tuple(sweep.vary),
        trials=found,
        groups=groups,
        best=_best(sweep, found, groups),
        ledger=None,
    )


def _trial(trial: FrozenTrial, folder: Path, cache_fingerprint: str) -> Trial:
    attrs = trial.user_attrs
    summary = attrs.get("summary") or {}
    own = Path("students") / folder_name(attrs["parameters"])
    return Trial(
        number=trial.number,
        state=_STATES[trial.state],
        parameters=attrs["parameters"],
        value=trial.value if trial.state == TrialState.COMPLETE else None,
        validation=summary.get("validation"),
        train=summary.get("train"),
        model=summary.get("model"),
        cache_fingerprint=summary.get("fingerprints", {}).get("cache", cache_fingerprint),
        folder=str(Path(folder.parent.name) / folder.name / own) if (folder / own).is_dir() else None,
        elapsed_s=attrs.get("elapsed_s"),
        reason=attrs.get("reason"),
        looks=tuple(
            (step, value if math.isfinite(value) else None) for step, value in sorted(trial.intermediate_values.items())
        ),
    )


def _groups(sweep: SweepConfig, trials: tuple[Trial, ...]) -> tuple[SeedGroup, ...]:
    by_point: dict[str, list[Trial]] = {}
    seeds: dict[str, set[Any]] = {}
    for trial in trials:
        point = json.dumps(without_seed(trial.parameters, sweep))
        seeds.setdefault(point, set(sweep.seeds)).add(trial.parameters.get(SEED))
        if trial.state == "complete":
            by_point.setdefault(point, []).append(trial)
    return tuple(
        SeedGroup(
            parameters=json.loads(point),
            trials=tuple(trial.number for trial in members),
            mean=statistics.fmean(values),
            deviation=statistics.stdev(values) if len(values) > 1 else None,
            num_seeds=len(seeds[point]),
        )
        for point, members in by_point.items()
        if (values := [trial.value for trial in members if trial.value is not None])
    )


def _best(sweep: SweepConfig, trials: tuple[Trial, ...], groups: tuple[SeedGroup, ...]) -> int | None:
    if not groups:
        return None
    best = min if sweep.direction == "minimize" else max
    values = {trial.number: trial.value for trial in trials if trial.value is not None}
    return best(_ranked(groups, sweep.direction)[0].trials, key=values.__getitem__)


def _ranked(groups: tuple[SeedGroup, ...], direction: Literal["minimize", "maximize"]) -> list[SeedGroup]:
    """The best first: points with all their seeds before those of which some were ended or failed."""
    sign = -1 if direction == "maximize" else 1
    return sorted(groups, key=lambda group: (not group.is_whole, sign * group.mean))


def write_results(results: SweepResults, folder: Path) -> None:
    """Replace both files; to be called with the sweep's folder locked."""
    write_atomically(folder / "results.csv", results_csv(results).encode())
    write_atomically(folder / "results.json", (results.model_dump_json(indent=2) + "\n").encode())


def results_csv(results: SweepResults) -> str:
    """A line per trial; lists and tables among parameters as JSON, among metrics left to results.json."""
    keys = list(dict.fromkeys(key for trial in results.trials for key in trial.parameters))
    metrics = list(
        dict.fromkeys(
            key
            for trial in results.trials
            for key, value in (trial.validation or {}).items()
            if not isinstance(value, list | tuple | dict)
        )
    )
    text = io.StringIO()
    rows: csv.DictWriter[str] = csv.DictWriter(text, [], lineterminator="\n")
    for trial in results.trials:
        validation, train, model = trial.validation or {}, trial.train or {}, trial.model or {}
        row = {
            "trial": trial.number,
            "state": trial.state,
            **{key: _plain(trial.parameters.get(key)) for key in keys},
            results.metric: trial.value,
            **{f"validation.{key}": validation.get(key) for key in metrics},
            **{f"train.{key}": train.get(key) for key in _TRAIN_COLUMNS},
            **{f"model.{key}": model.get(key) for key in _MODEL_COLUMNS},
            "elapsed_s": trial.elapsed_s,
            "cache_fingerprint": trial.cache_fingerprint,
            "folder": trial.folder,
            "reason": trial.reason,
        }
        if not rows.fieldnames:
            rows.fieldnames = list(row)
            rows.writeheader()
        rows.writerow(row)
    return text.getvalue()


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict | bool) else value


def results_text(results: SweepResults, run_dir: Path) -> str:
    """The tables that are printed: every trial, points over their seeds, the best student and where it is."""
    keys = list(dict.fromkeys(key for trial in results.trials for key in trial.parameters))
    titles, forms = short_keys(keys), COLUMNS | {"loss_nats": ("loss, nats", "{:.4f}")}
    own = results.metric.removeprefix("validation.")
    shown = list(dict.fromkeys([own, "perplexity", "kl_to_teacher_nats", "top1_agreement"]))
    header = ["trial", *titles.values(), *(forms[key][0] for key in shown), "packed, MiB", "s", "state"]
    lines = [
        [
            f"{trial.number}{' *' * (trial.number == results.best)}",
            *(value_text(trial.parameters[key]) if key in trial.parameters else "-" for key in keys),
            *(_number((trial.validation or {}).get(key), forms[key][1]) for key in shown),
            _number(trial.model["packed_bytes"] / 2**20 if trial.model else None, "{:.2f}"),
            _number(trial.elapsed_s, "{:,.0f}"),
            trial.state + (f": {trial.reason}" if trial.reason else ""),
        ]
        for trial in results.trials
    ]
    parts = [text_table([header, *lines])]
    has_seeds = any((group.num_seeds or len(group.trials)) > 1 for group in results.groups)
    if has_seeds:
        parts.append(_groups_text(results, forms[own][0], forms[own][1]))
    if results.best is not None:
        best = next(trial for trial in results.trials if trial.number == results.best)
        of = ", the best seed of the best point" if has_seeds else ""
        where = run_dir / best.folder if best.folder else "not in this folder"
        parts.append(f"best: trial {best.number}, {in_words(best.parameters)}{of}: {where}")
    parts.append(f"cache {results.cache_fingerprint}")
    return "\n\n".join(parts)


def _groups_text(results: SweepResults, title: str, form: str) -> str:
    """Points over their seeds, the best first."""
    titles = short_keys(list(results.varied))
    rows = []
    for group in _ranked(results.groups, results.direction):
        spread = "" if group.deviation is None else f" +- {form.format(group.deviation)}"
        values = [value_text(group.parameters[key]) for key in titles]
        rows.append([*values, form.format(group.mean) + spread, group.seeds_text])
    return text_table([[*titles.values(), title, "seeds"], *rows])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
