"""Caches so small that every byte of them can be damaged in turn: one shard of one split."""

from pathlib import Path

import numpy as np
from coded_profiles import PROFILES, TRANSFORM, fitted_tables, given_arrays, spec_with_tables

from conftest import TOKENIZER_JSON, make_spec, window_arrays
from tristill.cache import CacheSpec, CacheWriter, SplitSpec
from tristill.cache.profiles.profile import Place

WINDOWS, T = 3, 6
KINDS = ("coded", "masked", "hidden")
_MASK = np.array([[1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], np.uint8)


def write_tiny_cache(folder: Path, kind: str) -> CacheSpec:
    """coded: dithered transform. masked: coded heads, some positions not counting. hidden: plain, with two layers."""
    place = Place("train", 0, WINDOWS, T)
    image = None
    if kind == "hidden":
        spec = make_spec(WINDOWS, 1, per_chunk=2, per_shard=4)
    else:
        profile = TRANSFORM if kind == "coded" else PROFILES["topk"]
        arrays = given_arrays(profile, place, 0)
        spec, image = spec_with_tables(profile, fitted_tables(profile, arrays, place), WINDOWS)
    counted = int(_MASK.sum()) if kind == "masked" else None
    split = SplitSpec(num_windows=WINDOWS, bytes_per_token=3.0, fingerprint="a" * 64, counted_positions=counted)
    changes = {"splits": {"train": split}, "windows_per_chunk": 2, "windows_per_shard": 4}
    version = {"format_version": 3} if kind == "masked" else {}
    spec = CacheSpec.model_validate(spec.model_dump() | changes | version)
    content = window_arrays(spec, "train", range(WINDOWS))
    content["input_ids"] %= spec.vocab_size
    if kind == "masked":
        content["mask"] = _MASK
    if spec.profile.make_coder is not None:
        content |= given_arrays(spec.profile, place, 0)
    writer = CacheWriter(folder, spec, TOKENIZER_JSON, image)
    (shard,) = writer.missing_shards()
    shard_writer = writer.shard(shard)
    shard_writer.append(content)
    shard_writer.commit()
    writer.finish()
    return spec
