"""From the teacher's distribution to draws (docs/format.md, section 4, profile `sampled`).

Shapes: N positions, V vocabulary, K draws.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from tristill.cache.profiles.sampled import SampledProfile


def draws(p_NV: Tensor, uniforms_NU: Tensor, profile: SampledProfile) -> dict[str, Tensor]:
    """K draws from p, by inversion of its cumulated sum in the order of ids.

    `uniforms_NU` in [0, 1): K per position for independent draws (with replacement), one, u, for systematic ones,
    taken at (u + i) / K. draw_unique (N,), draw_ids (N, K) ascending, draw_counts (N, K), of which the first
    `draw_unique` count.
    """
    num_draws = profile.draws
    cumulated_NV = p_NV.cumsum(dim=-1, dtype=torch.float64)
    if profile.draw == "systematic":
        at_NK = (uniforms_NU + torch.arange(num_draws, device=p_NV.device)) / num_draws
    else:
        at_NK = uniforms_NU.sort(dim=-1).values
    ids_NK = torch.searchsorted(cumulated_NV, at_NK * cumulated_NV[:, -1:], right=True)
    ids_NK = ids_NK.clamp_(max=p_NV.shape[1] - 1)
    is_new_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    is_new_NK[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :-1]
    place_NK = is_new_NK.cumsum(dim=-1) - 1
    unique_N = place_NK[:, -1] + 1
    counts_NK = torch.zeros_like(ids_NK).scatter_add_(-1, place_NK, torch.ones_like(ids_NK))
    unique_NK = ids_NK[:, :1].expand_as(ids_NK).clone().scatter_(-1, place_NK, ids_NK)
    return {"draw_unique": unique_N, "draw_ids": unique_NK, "draw_counts": counts_NK}


def uniforms(profile: SampledProfile, split: str, windows: list[int], context_length: int) -> np.ndarray:
    """Float64 (P T, U) in [0, 1), a pure function of the profile's seed, the split and each window's number."""
    name = int.from_bytes(hashlib.sha256(f"draws/{split}".encode()).digest()[:4], "little")
    per_position = 1 if profile.draw == "systematic" else profile.draws
    rows = []
    for window in windows:
        sequence = np.random.SeedSequence(profile.seed, spawn_key=(name, window))
        rows.append(np.random.Generator(np.random.Philox(sequence)).random((context_length, per_position)))
    return np.concatenate(rows)
