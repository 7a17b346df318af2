"""Before the first shard: what the cache will declare, with its profile resolved and its tables fitted.

A dump that is resumed finds the tables on disk, made from the same things, and goes on with them.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from tristill.cache import CacheCorruptError, CacheSpec, HiddenSpec, SplitName, SplitSpec
from tristill.cache.calibration import Calibration
from tristill.cache.hashing import fingerprint_of
from tristill.cache.layout import TABLES_NAME, default_windows_per_chunk, windows_per_shard
from tristill.cache.profiles.plain_topk import PlainTopKProfile
from tristill.cache.spec import FORMAT_VERSION, MASKED_VERSION, AnyProfile, describe
from tristill.cache.tables import load_calibration, load_tables, tables_image
from tristill.stages.data.tokenized import TokenizedCorpus
from tristill.stages.data.tokens import TokenWindows
from tristill.stages.dump.calibrate import Sample, calibrate
from tristill.stages.dump.config import MEASURED_POSITIONS, DumpConfig, within_vocabulary
from tristill.stages.dump.ensemble import ALONE, Ensemble
from tristill.stages.dump.extract import TeacherPositions
from tristill.stages.dump.forward import sample_positions
from tristill.stages.dump.hidden_calibrate import calibrate_hidden
from tristill.stages.errors import CheckpointError
from tristill.stages.fidelity.measure import NOISE_SHARE, FeaturePairs, near_student
from tristill.stages.models.language_model import LanguageModel, require_positions
from tristill.stages.progress import Progress, waiting
from tristill.stages.threads import torch_threads

_SMALLEST_SHARE = 1 / 8


@dataclass(frozen=True)
class Prepared:
    """A cache's spec, and the bytes of its `tables.h5`, None if it needs none."""

    spec: CacheSpec
    tables_image: bytes | None


def prepare(
    config: DumpConfig,
    corpus: TokenizedCorpus,
    teacher: LanguageModel,
    teacher_fingerprint: str,
    windows: Mapping[SplitName, TokenWindows],
    folder: Path,
    ensemble: Ensemble = ALONE,
) -> Prepared:
    """The spec of a dump, from the tables in `folder` if they were made from the same, else by calibration.

    teacher_fingerprint: of `teacher` and the ensemble beside it. windows: of both splits.
    """
    check_teacher(config, corpus, teacher)
    splits = split_specs(config, corpus, windows)
    request = fingerprint_of(
        {
            "config": config.numbers(),
            "teacher": teacher_fingerprint,
            "tokenizer": corpus.tokenizer_sha256,
            "splits": {name: split.fingerprint for name, split in splits.items()},
        }
    )
    config = config.model_copy(update={"profile": within_vocabulary(config.profile, corpus.vocab_size)})
    if isinstance(config.profile, PlainTopKProfile) and not config.hidden_layers:
        return Prepared(cache_spec(config, corpus, splits, teacher_fingerprint, config.profile, None, None), None)
    if found := _prepared_on_disk(folder, request, partial(cache_spec, config, corpus, splits, teacher_fingerprint)):
        return found
    total = sum(split.counted_positions or split.num_windows * corpus.context_length for split in splits.values())
    # One thread on a CPU, so that the tables do not depend on the number of cores.
    with torch_threads(1 if teacher.head_weight.device.type == "cpu" else torch.get_num_threads()):
        sample = calibration_sample(config, teacher, windows["train"], splits["train"].num_windows, total, ensemble)
        with waiting("calibration: tables"):
            fitted, calibration = calibrate(config, sample, request)
        tables = {f"target.{name}": table for name, table in fitted.tables.items()}
        hidden_spec = None
        if config.hidden_layers:
            fitted_hidden, points = calibrate_hidden(config, teacher, windows["train"], sample)
            hidden_spec = fitted_hidden.spec
            tables |= fitted_hidden.tables
            calibration = calibration.model_copy(
                update={"hidden": hidden_spec.model_dump(mode="json"), "hidden_points": points}
            )
    return with_tables(config, corpus, splits, teacher_fingerprint, fitted.profile, hidden_spec, tables, calibration)


_ANY_PROFILE: TypeAdapter[AnyProfile] = TypeAdapter(AnyProfile)


def _prepared_on_disk(
    folder: Path, request: str, spec_of: Callable[[AnyProfile, HiddenSpec | None, bytes | None], CacheSpec]
) -> Prepared | None:
    """What an earlier dump of the same request prepared; None if there is none, or it is damaged: it is made again."""
    try:
        found = load_calibration(folder)
        if found is None or found.request != request:
            return None
        profile = _ANY_PROFILE.validate_python(found.profile)
        hidden = None if found.hidden is None else HiddenSpec.model_validate(found.hidden)
        image = (folder / TABLES_NAME).read_bytes()
        spec = spec_of(profile, hidden, image)
        load_tables(folder, spec)
    except (CacheCorruptError, ValidationError):
        return None
    return Prepared(spec, image)


def with_tables(
    config: DumpConfig,
    corpus: TokenizedCorpus,
    splits: Mapping[SplitName, SplitSpec],
    teacher_fingerprint: str,
    profile: AnyProfile,
    hidden: HiddenSpec | None,
    tables: dict[str, np.ndarray],
    calibration: Calibration,
) -> Prepared:
    """The spec of a cache with everything resolved; `tables` are those of all parts, `<part>.<name>`."""
    if not tables:
        return Prepared(cache_spec(config, corpus, splits, teacher_fingerprint, profile, hidden, None), None)
    draft = cache_spec(config, corpus, splits, teacher_fingerprint, profile, hidden, b"")
    image = tables_image(draft.tables, tables, calibration)
    return Prepared(cache_spec(config, corpus, splits, teacher_fingerprint, profile, hidden, image), image)


def calibration_sample(
    config: DumpConfig,
    teacher: LanguageModel,
    windows: TokenWindows,
    num_windows: int,
    total_positions: int,
    ensemble: Ensemble = ALONE,
) -> Sample:
    """Windows spread evenly over the train split to fit on, and others between them to measure on.

    Of windows in which some positions count; more of them the fewer do, up to eight times as many.
    """
    counts_W = windows.counts()[:num_windows]
    candidates = np.flatnonzero(counts_W)
    share = max(_SMALLEST_SHARE, counts_W[candidates].mean() / windows.context_length)
    num_measured = max(1, min(len(candidates) // 2, round(MEASURED_POSITIONS / (windows.context_length * share))))
    num_fitted = max(1, min(len(candidates) - num_measured, round(config.calibration_windows / share)))
    places_W = np.linspace(0, len(candidates) - 1, min(len(candidates), num_fitted + num_measured)).astype(int)
    chosen = candidates[places_W].tolist()
    places = set(np.linspace(0, len(chosen) - 1, num_measured).astype(int).tolist())
    measured = [window for place, window in enumerate(chosen) if place in places]
    fitted = [window for place, window in enumerate(chosen) if place not in places] or measured
    student = near_student(teacher)

    num_positions = (len(fitted) + 2 * len(measured)) * windows.context_length
    with Progress("calibration", num_positions, "positions") as progress:

        def positions_of(model: LanguageModel, rows: list[int], beside: Ensemble) -> TeacherPositions:
            size, precision = config.batch_windows, config.precision
            return sample_positions(model, windows, "train", rows, size, precision, beside, progress.advance)

        fit, measure = positions_of(teacher, fitted, ensemble), positions_of(teacher, measured, ensemble)
        near = positions_of(student, measured, ALONE)  # after them: where the teacher overflows it is named, not this
    return Sample(
        fit=fit,
        measure=measure,
        student=FeaturePairs(near.final_ND, near.head_VD.float()),
        student_name=f"the teacher with {NOISE_SHARE:.0%} noise on its weights",
        total_positions=total_positions,
        measured_ids_PT=windows.read(measured)[:, :-1] if windows.is_masked else None,
    )


def check_teacher(config: DumpConfig, corpus: TokenizedCorpus, teacher: LanguageModel) -> None:
    """Raise CheckpointError if teacher and corpus do not belong together, or a layer asked for is not there."""
    if teacher.vocab_size != corpus.vocab_size:
        raise CheckpointError(
            f"the teacher has {teacher.vocab_size} output entries, but the tokenizer of the corpus has "
            f"{corpus.vocab_size}; train the teacher on this corpus"
        )
    require_positions(teacher, corpus.context_length)
    if teacher.softcap is not None and config.profile.kind in {"transform", "dense"}:
        raise CheckpointError(
            f"cache.profile: found {config.profile.kind}, which keeps the final states, whose products with the output "
            f"matrix are the logits, but the teacher caps them at {teacher.softcap:g}; set kind to topk or sampled"
        )
    if beyond := [layer for layer in config.hidden_layers if layer > teacher.depth]:
        raise CheckpointError(f"cache.hidden_layers: found {beyond}, but the teacher has {teacher.depth} blocks")


def split_specs(
    config: DumpConfig, corpus: TokenizedCorpus, windows: Mapping[SplitName, TokenWindows]
) -> dict[SplitName, SplitSpec]:
    """The splits of a dump. Raises CheckpointError if one has no position that counts."""

    def split_spec(split: SplitName, max_windows: int | None) -> SplitSpec:
        all_windows = corpus.num_windows(split)
        num_windows = min(all_windows, max_windows or all_windows)
        counted = int(windows[split].counts()[:num_windows].sum()) if corpus.is_masked else None
        if counted == 0:
            raise CheckpointError(
                f"cache.max_train_windows: in the first {num_windows} windows of split {split} the assistant says "
                "nothing; dump more of them"
            )
        return SplitSpec(
            num_windows=num_windows,
            bytes_per_token=corpus.splits[split].bytes_per_token,
            fingerprint=corpus.windows_fingerprint(split, num_windows),
            counted_positions=counted,
        )

    limits: dict[SplitName, int | None] = {"train": config.max_train_windows}
    return {split: split_spec(split, limits.get(split)) for split in corpus.splits}


def cache_spec(
    config: DumpConfig,
    corpus: TokenizedCorpus,
    splits: Mapping[SplitName, SplitSpec],
    teacher_fingerprint: str,
    profile: AnyProfile,
    hidden: HiddenSpec | None,
    tables: bytes | None,
) -> CacheSpec:
    """What the cache will declare, for the bytes of its tables."""
    per_chunk = default_windows_per_chunk(corpus.context_length)
    try:
        return CacheSpec(
            format_version=MASKED_VERSION if corpus.is_masked else FORMAT_VERSION,
            vocab_size=corpus.vocab_size,
            end_of_text_id=corpus.end_of_text_id,
            bos_id=corpus.bos_id,
            context_length=corpus.context_length,
            profile=profile,
            hidden=hidden,
            splits=dict(splits),
            windows_per_chunk=per_chunk,
            windows_per_shard=windows_per_shard(corpus.context_length, config.shard_positions),
            teacher_fingerprint=teacher_fingerprint,
            tokenizer_fingerprint=corpus.tokenizer_sha256,
            tables_fingerprint=None if tables is None else hashlib.sha256(tables).hexdigest(),
        )
    except ValidationError as exc:
        raise CheckpointError(f"the cache cannot hold that:\n{describe(exc)}") from exc
