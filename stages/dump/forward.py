"""Forwards the teacher over windows.

Shapes: P windows, T positions, N positions that count, V vocabulary, D width.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tristill.stages.data.tokens import TokenWindows
from tristill.stages.dump.ensemble import ALONE, Ensemble
from tristill.stages.dump.extract import TeacherPositions
from tristill.stages.dump.hidden_fit import HiddenWindows
from tristill.stages.losses.target import ComputedTargets
from tristill.stages.models.language_model import Features, LanguageModel, State, finite_features


def no_progress(positions: int) -> None:
    """Nobody looks."""
    del positions


@torch.inference_mode()
def forward_windows(
    teacher: LanguageModel,
    windows: TokenWindows,
    split: str,
    rows: list[int],
    precision: str,
    states: Collection[State] = (),
    ensemble: Ensemble = ALONE,
) -> tuple[TeacherPositions, dict[int, Tensor], np.ndarray]:
    """The teacher at the positions of these windows, its states (P, T, D) by layer, the windows' ids (P, T + 1).

    At positions that count alone, but for the states. With precision bfloat16, matrix products run under autocast, that
    of the output head too. States are those of `teacher`, whatever stands beside it.
    """
    device = teacher.head_weight.device
    ids_PT1 = windows.read(rows)
    ids = torch.from_numpy(ids_PT1.astype(np.int64)).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        features = finite_features(teacher, ids[:, :-1], states)
        others = [
            (model, finite_features(model, ids[:, :-1], whose=f"cache.ensemble: teacher {number}"))
            for number, model in enumerate(ensemble.others, start=2)
        ]
    counts_PT = windows.mask(rows)
    counted = None if counts_PT is None else torch.from_numpy(counts_PT).to(device).flatten()
    own, *rest = (_output(model, found, precision, counted) for model, found in [(teacher, features), *others])
    positions = TeacherPositions(
        final_ND=own.final_ND,
        head_VD=own.head_VD,
        input_ids_N=_counted(ids[:, :-1].flatten(), counted),
        labels_N=_counted(ids[:, 1:].flatten(), counted),
        split=split,
        windows=rows,
        others=tuple(rest),
        shares=ensemble.shares,
        counts_PT=counts_PT,
        softcap=teacher.softcap,
    )
    return positions, {state.layer: found for state, found in features.hidden.items()}, ids_PT1


def _counted(values: Tensor, counted: Tensor | None) -> Tensor:
    """Rows of the positions that count, of all positions' if None."""
    return values if counted is None else values[counted]


def _output(model: LanguageModel, features: Features, precision: str, counted: Tensor | None) -> ComputedTargets:
    """What a teacher's output head takes."""
    final_ND = _counted(features.final_BTD.flatten(0, 1), counted).float()
    head_VD = model.head_weight.detach()
    head_VD = head_VD.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    return ComputedTargets(final_ND, head_VD, model.softcap)


def sample_hidden(
    teacher: LanguageModel,
    windows: TokenWindows,
    split: str,
    rows: list[int],
    batch_windows: int,
    precision: str,
    wanted: Collection[State],
    advance: Callable[[int], object] = no_progress,
) -> HiddenWindows:
    """The hidden states of many windows, forwarded in batches."""
    batches = [rows[first : first + batch_windows] for first in range(0, len(rows), batch_windows)]
    parts = []
    for batch in batches:
        parts.append(forward_windows(teacher, windows, split, batch, precision, wanted))
        advance(len(batch) * windows.context_length)
    return HiddenWindows(
        states={layer: torch.cat([hidden[layer].float() for _, hidden, _ in parts]) for _, layer in wanted},
        input_ids_PT=torch.from_numpy(windows.read(rows)[:, :-1].astype(np.int64)).to(teacher.head_weight.device),
        counts_PT=windows.mask(rows),
    )


def sample_positions(
    teacher: LanguageModel,
    windows: TokenWindows,
    split: str,
    rows: list[int],
    batch_windows: int,
    precision: str,
    ensemble: Ensemble = ALONE,
    advance: Callable[[int], object] = no_progress,
) -> TeacherPositions:
    """The teacher at the positions of many windows, forwarded in batches; `advance` is told how many are done."""
    batches = [rows[first : first + batch_windows] for first in range(0, len(rows), batch_windows)]
    parts = []
    for batch in batches:
        parts.append(forward_windows(teacher, windows, split, batch, precision, ensemble=ensemble)[0])
        advance(len(batch) * windows.context_length)
    others = (
        replace(outputs[0], final_ND=torch.cat([output.final_ND for output in outputs]))
        for outputs in zip(*(part.others for part in parts), strict=True)
    )
    return TeacherPositions(
        final_ND=torch.cat([part.final_ND for part in parts]),
        head_VD=parts[0].head_VD,
        input_ids_N=torch.cat([part.input_ids_N for part in parts]),
        labels_N=torch.cat([part.labels_N for part in parts]),
        split=split,
        windows=rows,
        others=tuple(others),
        shares=ensemble.shares,
        softcap=teacher.softcap,
        counts_PT=windows.mask(rows),
    )
