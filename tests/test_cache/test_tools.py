"""Verify, repair, peek and histograms, on files that are really damaged."""

import hashlib
import os
import shutil
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from conftest import TOKENIZER_JSON, make_spec, write_cache
from tristill.cache import (
    Cache,
    CacheCorruptError,
    CacheMissingError,
    CacheRequestError,
    CacheSpec,
    CacheWriter,
    DenseProfile,
    PlainTopKProfile,
    SampledProfile,
    TopKProfile,
    TransformProfile,
    open_cache,
    verify_cache,
)
from tristill.cache.calibration import Calibration, FidelityPoint
from tristill.cache.coding.frequencies import frequencies_from_counts
from tristill.cache.distribution import largest_probabilities
from tristill.cache.hashing import sha256_of_file
from tristill.cache.histograms import sample
from tristill.cache.manifest import load_manifest, save_manifest
from tristill.cache.parts import SIGNAL_STEP_NATS
from tristill.cache.peek import peek
from tristill.cache.profiles.heads import HeadSize
from tristill.cache.profiles.profile import Profile
from tristill.cache.repair import SCRATCH_NAME, lend_good_files, manifest_of_shards, restore_copy, take_back
from tristill.cache.shard import spec_of_shard
from tristill.cache.tables import tables_image
from tristill.cache.verify import find_damage
from tristill.cache.writer import verified_record
from tristill.stages.targets.stored import make_targets

VOCAB = 300
CALIBRATION = Calibration(
    request="r" * 64,
    student="a student",
    positions=10,
    profile={},
    target="at most 9 bytes/position",
    points=(
        FidelityPoint(
            settings={"draws": 6},
            bytes_per_position=8.5,
            angle_deg={"1.0": 2.25},
            norm_ratio={"1.0": 1.5},
            kl_nats={"1.0": None},
        ),
    ),
    chosen=0,
)
PROFILES = [
    PlainTopKProfile(top_k=5, temperature=2.0),
    PlainTopKProfile(top_k=VOCAB, logit_dtype="float32"),
    TopKProfile(head=HeadSize(probability=0.02, max_entries=8), temperatures=(1.0, 2.0)),
    TopKProfile(head=HeadSize(probability=0.02, max_entries=8), tail="uniform"),
    TopKProfile(head=HeadSize(probability=0.02, max_entries=8), tail="nothing"),
    SampledProfile(draws=6, temperature=1.5),
    TransformProfile(
        step=0.5, width=8, rank=3, basis_rank=5, head=HeadSize(max_entries=4), temperatures=(1.0, 2.0), dither=True
    ),
    DenseProfile(width=8, temperature=2.0),
]
names = lambda profile: f"{profile.kind}-{profile.temperature:g}-{getattr(profile, 'tail', '')}"  # noqa: E731


def silent(num_bytes: int) -> None:
    """Progress is of no interest here."""


def tables_of(spec: CacheSpec) -> dict[str, np.ndarray]:
    """Tables that are of no use but valid: flat models, a shuffled order of ids, and small random numbers."""
    generator = np.random.default_rng(7)
    part, tables = spec.target_part, {}
    for table in part.tables:
        values = generator.normal(size=table.shape)
        if table.name == "ids_by_rank":
            values = generator.permutation(VOCAB)
        elif table.dtype == "<i2":
            values = generator.integers(-20, 20, table.shape)
        elif table.name == "tail_predictor":
            values = np.zeros(table.shape)
        tables[f"target.{table.name}"] = values
    for name, shape in part.models.items():
        tables[f"target.{name}"] = frequencies_from_counts(np.ones(shape))
    return tables


def head_of(logits_NV: np.ndarray, count: int, taus: tuple[float, ...]) -> dict[str, np.ndarray]:
    """A head of 1 to `count` entries per row, entries past its size repeating the first, with exact tails."""
    num_rows = len(logits_NV)
    counts_N = 1 + np.arange(num_rows) % count
    order_NK = np.argsort(-logits_NV, axis=1)[:, :count]
    order_NK = np.where(np.arange(count) < counts_N[:, None], order_NK, order_NK[:, :1])
    relative_NV = logits_NV - logits_NV.max(axis=1, keepdims=True)
    outside_NV = relative_NV.copy()
    np.put_along_axis(outside_NV, order_NK, -np.inf, axis=1)
    tails = [np.log(np.exp(outside_NV / tau).sum(axis=1)) for tau in taus]
    return {
        "head_count": counts_N.astype(np.uint8),
        "head_ids": order_NK,
        "head_logits": np.take_along_axis(relative_NV, order_NK, axis=1) / (taus or (1.0,))[0],
        **({"tail_logsumexp": np.stack(tails, axis=1)} if taus else {}),
    }


def arrays_of(profile: Profile, logits_NV: np.ndarray) -> dict[str, np.ndarray]:
    """What a dump would write of these logits, as far as the profile is made from logits at all."""
    generator = np.random.default_rng(8)
    num_rows = len(logits_NV)
    match profile:
        case PlainTopKProfile():
            order_NK = np.argsort(-logits_NV, axis=1)[:, : profile.top_k]
            relative_NV = (logits_NV - logits_NV.max(axis=1, keepdims=True)) / profile.temperature
            outside_NV = relative_NV.copy()
            np.put_along_axis(outside_NV, order_NK, -np.inf, axis=1)
            with np.errstate(divide="ignore"):
                tail_N = np.log(np.exp(outside_NV).sum(axis=1))
            head_logits = np.take_along_axis(relative_NV, order_NK, axis=1)
            return {"head_ids": order_NK, "head_logits": head_logits, "tail_logsumexp": tail_N}
        case TopKProfile():
            return head_of(
                logits_NV, profile.head.max_entries, () if profile.tail == "nothing" else profile.temperatures
            )
        case SampledProfile():
            unique_N = 1 + np.arange(num_rows) % 3
            ids_NK = np.argsort(-logits_NV, axis=1)[:, : profile.draws]
            counts_NK = np.where(np.arange(profile.draws) < unique_N[:, None], 1, 0)
            counts_NK[:, 0] += profile.draws - unique_N
            return {"draw_unique": unique_N, "draw_ids": ids_NK, "draw_counts": counts_NK}
        case TransformProfile():
            coefficients = generator.normal(size=(num_rows, profile.rank)) * 3
            return {"coefficients": coefficients, **head_of(logits_NV, profile.head.max_entries, profile.temperatures)}
        case _:
            assert isinstance(profile, DenseProfile)
            final = generator.integers(-127, 128, (num_rows, profile.width))
            return {"final": final, "final_scale": generator.uniform(0.001, 0.02, num_rows)}


def cache_of(folder: Path, profile: Profile, **changes: object) -> Cache:
    """A finished cache of any profile, with 13 windows of train and 3 of validation."""
    has_tables = bool(profile.tables(VOCAB) or profile.models(VOCAB))
    fingerprint = "0" * 64 if has_tables else None
    draft = make_spec(13, 3, per_shard=8, profile=profile, hidden=None, tables_fingerprint=fingerprint, **changes)
    image = tables_image(draft.tables, tables_of(draft), CALIBRATION) if draft.tables else None
    spec = draft.model_copy(update={"tables_fingerprint": hashlib.sha256(image).hexdigest()}) if image else draft
    writer = CacheWriter(folder, spec, TOKENIZER_JSON, image)
    generator = np.random.default_rng(9)
    for shard in writer.missing_shards():
        shape = (shard.num_windows, spec.context_length)
        target = arrays_of(profile, generator.normal(size=(shape[0] * shape[1], VOCAB)) * 2)
        arrays = {name: array.reshape(*shape, *array.shape[1:]) for name, array in target.items()}
        arrays["input_ids"] = generator.integers(0, VOCAB, (shape[0], shape[1] + 1))
        arrays |= {name: generator.integers(0, 40, shape) for name in ("teacher_entropy", "label_log_prob")}
        shard_writer = writer.shard(shard)
        shard_writer.append({array.name: arrays[array.name].astype(array.dtype) for array in spec.arrays})
        shard_writer.commit()
    writer.finish()
    return open_cache(folder)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# Verify


def test_verify_reports_the_same_problems_in_the_same_order_with_any_number_of_threads(small_cache: Cache) -> None:
    folder = small_cache.folder
    flip(folder / "train-00003.h5", 3000)
    (folder / "train-00001.h5").unlink()
    os.truncate(folder / "train-00000.h5", 100)
    (folder / "validation-00000.h5").write_bytes((folder / "train-00004.h5").read_bytes())
    (folder / "tokenizer.json").unlink()
    reported = [verify_cache(folder, silent, workers) for workers in (1, 2, 8, None)]
    assert all(problems == reported[0] for problems in reported)
    order = ["train-00000", "train-00001", "train-00003", "validation-00000", "tokenizer.json"]
    assert all(name in text for name, text in zip(order, reported[0], strict=True))


def test_verify_checks_shards_in_several_threads_and_tells_progress_in_one(small_cache: Cache) -> None:
    seen: list[tuple[int, int]] = []
    small_cache.verify(lambda num_bytes: seen.append((num_bytes, threading.get_ident())))
    assert [num_bytes for num_bytes, _ in seen] == [record.file_bytes for record in small_cache.manifest.shards]
    assert {thread for _, thread in seen} == {threading.get_ident()}


def test_a_shards_hash_is_that_of_the_file_whatever_lies_between_its_chunks(small_cache: Cache) -> None:
    for record, shard in zip(small_cache.manifest.shards, small_cache.manifest.ranges, strict=True):
        path = small_cache.folder / record.name
        assert record.sha256 == sha256_of_file(path)
        with path.open("ab") as file:
            file.write(b"something after the end")
        grown = verified_record(path, small_cache.spec, shard)
        assert (grown.sha256, grown.file_bytes) == (sha256_of_file(path), path.stat().st_size)


def test_verify_finds_damaged_and_missing_tables(tmp_path: Path) -> None:
    folder = cache_of(tmp_path, SampledProfile()).folder
    assert verify_cache(folder, silent) == []
    flip(folder / "tables.h5", (folder / "tables.h5").stat().st_size // 2)
    (problem,) = verify_cache(folder, silent)
    expected = load_manifest(folder).spec.tables_fingerprint
    assert f"tables.h5: found SHA-256 {sha256_of_file(folder / 'tables.h5')}, expected {expected}" in problem
    (folder / "tables.h5").unlink()
    assert verify_cache(folder, silent) == [f"{folder}/tables.h5: is missing; the coded parts of every shard need it"]


def test_verify_finds_a_changed_calibration_in_the_manifest(tmp_path: Path) -> None:
    folder = cache_of(tmp_path, SampledProfile()).folder
    text = (folder / "cache.json").read_text()
    (folder / "cache.json").write_text(text.replace("2.25", "2.24"))
    (damage,) = find_damage(folder, load_manifest(folder), silent)
    assert damage.name == "cache.json"
    assert "its calibration is not the one that stands in tables.h5" in damage.text


# Repair


@pytest.mark.parametrize("profile", PROFILES, ids=names)
def test_a_manifest_made_from_the_shards_is_the_one_that_was_lost(tmp_path: Path, profile: Profile) -> None:
    cache_of(tmp_path, profile)
    lost = (tmp_path / "cache.json").read_bytes()
    (tmp_path / "cache.json").unlink()
    manifest = manifest_of_shards(tmp_path, silent)
    assert not (tmp_path / "cache.json").exists()
    save_manifest(tmp_path, manifest)
    assert (tmp_path / "cache.json").read_bytes() == lost
    assert (manifest.calibration == CALIBRATION) == bool(manifest.spec.tables)


@pytest.mark.parametrize("version", ["version-1", "version-2-plain"])
def test_a_manifest_of_any_version_is_made_again_as_that_version_wrote_it(tmp_path: Path, version: str) -> None:
    golden = Path(__file__).parent / "golden" / version
    shutil.copytree(golden, tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").unlink()
    assert manifest_of_shards(tmp_path / "cache", silent).to_json() == (golden / "cache.json").read_text()


def test_a_manifest_is_not_made_while_shards_are_missing(small_cache: Cache) -> None:
    folder = small_cache.folder
    (folder / "train-00001.h5").unlink()
    with pytest.raises(
        CacheMissingError, match=r"found 5 shards, but the cache .* also has train-00001.h5; run `trist"
    ):
        manifest_of_shards(folder, silent)
    for path in folder.glob("*.h5"):
        path.unlink()
    with pytest.raises(CacheMissingError, match="found 0 shards; run `tristill dump-logits` to make a cache"):
        manifest_of_shards(folder, silent)


def test_a_manifest_is_not_made_from_damaged_shards_or_tables_and_all_are_named(tmp_path: Path) -> None:
    folder = cache_of(tmp_path, TopKProfile(), windows_per_chunk=2).folder
    with h5py.File(folder / "train-00001.h5") as file:
        flip(folder / "train-00001.h5", file["target"].id.get_chunk_info(0).byte_offset + 9)
    flip(folder / "tables.h5", 2000)
    with pytest.raises(CacheCorruptError) as caught:
        manifest_of_shards(folder, silent)
    assert "train-00001.h5: dataset target, chunk 0: its stored bytes are damaged" in str(caught.value)
    assert "tables.h5: found SHA-256" in str(caught.value)
    assert "without these files no manifest can be made from the rest" in str(caught.value)


def set_spec(path: Path, text: str) -> None:
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        file.attrs["tristill_spec"] = np.bytes_(text.encode())


def test_the_spec_of_a_hostile_shard_is_held_against_the_others_and_the_files(small_cache: Cache) -> None:
    first, spec = small_cache.folder / "train-00000.h5", small_cache.spec.to_json()
    set_spec(first, spec.replace('"num_windows":70', '"num_windows":1000000000000000'))
    with pytest.raises(
        CacheMissingError, match=r"found 6 shards.* also has train-00005.h5, .*train-00009.h5, and more"
    ):
        manifest_of_shards(small_cache.folder, silent)
    set_spec(first, spec.replace('"vocab_size":300', '"vocab_size":301'))
    with pytest.raises(CacheCorruptError, match=r"train-00001.h5: .*vocab_size: found 300, expected 301"):
        manifest_of_shards(small_cache.folder, silent)
    set_spec(first, spec.replace('"context_length":6', '"context_length":999999999'))
    with pytest.raises(CacheCorruptError, match="expected at most 268435456"):
        spec_of_shard(first)


@pytest.mark.parametrize("what", ["link", "pipe", "text", "empty"])
def test_what_is_no_shard_is_not_asked_for_a_spec(small_cache: Cache, tmp_path: Path, what: str) -> None:
    first = small_cache.folder / "train-00000.h5"
    first.rename(tmp_path / "elsewhere.h5")
    make = {
        "link": lambda: first.symlink_to(tmp_path / "elsewhere.h5"),
        "pipe": lambda: os.mkfifo(first),
        "text": lambda: first.write_text("a spec"),
        "empty": first.touch,
    }
    make[what]()
    said = {"link": "is a link", "pipe": "is not a regular file"}.get(what, "is damaged or no HDF5 file")
    with pytest.raises(CacheCorruptError, match=rf"train-00000.h5: {said}"):
        spec_of_shard(first)
    with pytest.raises(CacheCorruptError, match=rf"train-00000.h5: {said}"):
        manifest_of_shards(small_cache.folder, silent)


def test_only_the_tokenizer_that_made_the_cache_is_restored(small_cache: Cache, tmp_path: Path) -> None:
    spec, target = small_cache.spec, small_cache.folder / "tokenizer.json"
    target.unlink()
    source = tmp_path / "tokenizer.json"
    assert not restore_copy(small_cache.folder, source, spec.tokenizer_fingerprint)
    source.write_bytes(TOKENIZER_JSON + b" ")
    assert not restore_copy(small_cache.folder, source, spec.tokenizer_fingerprint)
    assert not target.exists()
    source.write_bytes(TOKENIZER_JSON)
    assert restore_copy(small_cache.folder, source, spec.tokenizer_fingerprint)
    assert target.read_bytes() == TOKENIZER_JSON


def test_a_scratch_folder_gives_back_only_files_with_the_declared_bytes(small_cache: Cache, tmp_path: Path) -> None:
    folder, manifest = small_cache.folder, small_cache.manifest
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damaged = ["train-00000.h5", "train-00001.h5", "train-00002.h5"]
    for name in damaged:
        flip(folder / name, 2000)
    scratch = lend_good_files(folder, manifest, damaged)
    assert scratch == folder / SCRATCH_NAME
    assert sorted(path.name for path in scratch.iterdir()) == [
        "train-00003.h5",
        "train-00004.h5",
        "validation-00000.h5",
    ]
    (scratch / "train-00000.h5").write_bytes(before["train-00000.h5"])
    (scratch / "train-00001.h5").write_bytes(before["train-00000.h5"])
    (tmp_path / "outside").write_bytes(before["train-00002.h5"])
    (scratch / "train-00002.h5").symlink_to(tmp_path / "outside")
    assert take_back(folder, manifest, damaged) == ["train-00000.h5"]
    assert not scratch.exists()
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"train-00001.h5", "train-00002.h5"}
    assert take_back(folder, manifest, damaged) == []


def test_files_are_lent_without_hard_links_where_the_system_has_none(
    small_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    scratch = lend_good_files(small_cache.folder, small_cache.manifest, [])
    for record in small_cache.manifest.shards:
        assert sha256_of_file(scratch / record.name) == record.sha256
    shutil.rmtree(scratch)


# Peek


@pytest.mark.parametrize("profile", PROFILES, ids=names)
def test_the_probabilities_shown_are_those_that_students_learn_from(tmp_path: Path, profile: Profile) -> None:
    cache = cache_of(tmp_path, profile)
    batch = cache.window("train", 9)
    arrays = {name: array[0] for name, array in batch.target.items()}
    tables = cache.spec.target_part.own_tables(cache.tables)
    ids_N = batch.input_ids[0, :-1]
    shown = list(largest_probabilities(cache.spec.profile, arrays, tables, ids_N, count=4))
    tensors = {
        name: torch.from_numpy(array.copy()) for name, array in {**arrays, "teacher_entropy": ids_N * 0.0}.items()
    }
    make = make_targets(cache.spec.profile, tables, VOCAB, torch.device("cpu"))
    target = make(tensors, torch.from_numpy(ids_N.astype(np.int64))).chunk(slice(None))
    if isinstance(profile, SampledProfile):
        ids_NK, probs_NK = target.ids_NK, target.shares_NK
    else:
        found = target.log_probs(profile.temperature)
        log_probs = found[0] if isinstance(found, tuple) else found
        probs_NK = log_probs.double().exp()
        ids_NK = target.head_ids_NK if isinstance(found, tuple) else torch.arange(VOCAB).expand(len(ids_N), -1)
    for row, entries in enumerate(shown):
        expected = {int(i): float(p) for i, p in zip(ids_NK[row], probs_NK[row], strict=True) if p > 0}
        num_known = int(arrays["head_count"][row]) if profile.kind == "topk" else len(expected)
        assert len(entries) == min(4, num_known)
        assert [p for _, p in entries] == sorted((p for _, p in entries), reverse=True)
        for token_id, probability in entries:
            assert probability == pytest.approx(expected[token_id], rel=1e-4)
        assert entries[0][1] == pytest.approx(max(expected.values()), rel=1e-4)


def test_peek_shows_ids_and_signals_of_the_window_that_is_asked_for(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, SampledProfile())
    batch = cache.window("validation", 2)
    window = peek(cache, "validation", 2, range(4), num_top=1)
    seen = window.positions
    assert window.ids == batch.input_ids[0].tolist()
    assert window.label_probabilities == pytest.approx(np.exp(batch.signals["label_log_prob"][0].astype(np.float64)))
    assert [position.position for position in seen] == [0, 1, 2, 3]
    assert [position.input_id for position in seen] == batch.input_ids[0, :4].tolist()
    assert [position.label_id for position in seen] == batch.input_ids[0, 1:5].tolist()
    assert [position.entropy_nats for position in seen] == batch.signals["teacher_entropy"][0, :4].tolist()
    label_probs = np.exp(batch.signals["label_log_prob"][0, :4].astype(np.float64))
    assert [position.label_probability for position in seen] == pytest.approx(label_probs)
    assert [len(position.top) for position in seen] == [1] * 4
    assert len(peek(cache, "validation", 2, range(100), num_top=1).positions) == cache.spec.context_length
    assert peek(cache, "validation", 2, range(3, 5), num_top=2).positions == [
        *peek(cache, "validation", 2, range(100), num_top=2).positions[3:5]
    ]
    assert peek(cache, "validation", 2, range(100, 105), num_top=2).positions == []
    with pytest.raises(CacheRequestError, match="window 3: the split validation has 3 windows"):
        peek(cache, "validation", 3, range(1), num_top=1)


def test_peek_shows_a_cache_without_signals(tmp_path: Path) -> None:
    spec = make_spec(9, 2, format_version=1, profile=PlainTopKProfile(top_k=5, temperature=2.0))
    window = peek(write_cache(tmp_path, spec), "train", 0, range(1), num_top=2)
    (position,) = window.positions
    assert window.label_probabilities == [None] * spec.context_length
    assert (position.entropy_nats, position.label_probability) == (None, None)


# Histograms


@pytest.mark.parametrize("profile", PROFILES, ids=names)
def test_histograms_count_every_position_of_the_chunks_that_were_read(tmp_path: Path, profile: Profile) -> None:
    cache = cache_of(tmp_path, profile)
    found = sample(cache)
    assert (found.split, found.chunks, found.positions) == ("train", 4, 13 * 6)
    assert found.entropy_nats is not None
    steps = np.concatenate([cache.chunk("train", i).signals["teacher_entropy"].ravel() for i in range(4)])
    assert found.entropy_nats.edges == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert found.entropy_nats.counts == [int(((steps >= n) & (steps < n + 1)).sum()) for n in range(6)]
    assert found.entropy_nats.mean == pytest.approx(steps.mean())
    assert steps.max() < 40 * SIGNAL_STEP_NATS
    knows_head_mass = profile.kind in {"plain_topk", "transform"} or getattr(profile, "tail", "nothing") != "nothing"
    assert (found.head_mass is not None) == knows_head_mass
    if found.head_mass is not None:
        assert sum(found.head_mass.counts) == found.positions
        whole = getattr(profile, "top_k", None) == VOCAB
        assert (found.head_mass.mean == pytest.approx(1)) if whole else 0.05 < found.head_mass.mean < 0.95


def test_a_sample_of_few_chunks_reaches_from_the_first_to_the_last(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, PlainTopKProfile(top_k=5))
    assert sample(cache, max_chunks=2).positions == (4 + 1) * 6  # the last chunk holds one window
    assert sample(cache, max_chunks=1).positions == 4 * 6
    with pytest.raises(CacheRequestError, match="chunk 4: the split train has 13 windows"):
        cache.chunk("train", 4)
