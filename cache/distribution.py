"""What a cache knows of the teacher's distribution, as probabilities in numpy: for people to look at.

Training reads the same arrays through stages/targets; a test holds the two together.

Shapes: N positions, K stored entries, R coded coefficients, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tristill.cache.profiles.dense import DenseProfile
from tristill.cache.profiles.plain_topk import PlainTopKProfile
from tristill.cache.profiles.sampled import SampledProfile
from tristill.cache.profiles.topk import TopKProfile
from tristill.cache.profiles.transform import TABLE_UNITS_PER_STEP, TransformProfile
from tristill.cache.spec import AnyProfile

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Head:
    """Single entries, and all others as one, at tau_dump.

    log_probs_NK: float64, -inf where there is no entry. tail_N: log-mass of all others.
    """

    ids_NK: np.ndarray
    log_probs_NK: np.ndarray
    tail_N: np.ndarray

    @classmethod
    def of(cls, arrays: Arrays) -> "Head":
        """From the arrays of a profile with a head, (N, ..); one without a tail is taken for all there is."""
        logits_NK = arrays["head_logits"].astype(np.float64)
        if "head_count" in arrays:
            is_there_NK = np.arange(logits_NK.shape[1]) < arrays["head_count"][:, None]
            logits_NK = np.where(is_there_NK, logits_NK, -np.inf)
        tail_N = np.full(len(logits_NK), -np.inf)
        if "tail_logsumexp" in arrays:
            tail_N = arrays["tail_logsumexp"].reshape(len(logits_NK), -1)[:, 0].astype(np.float64)
        log_normalizer_N = np.logaddexp(_logsumexp(logits_NK), tail_N)
        return cls(arrays["head_ids"], logits_NK - log_normalizer_N[:, None], tail_N - log_normalizer_N)

    @property
    def mass(self) -> np.ndarray:
        """How much of the probability stands in single entries, (N,)."""
        return np.asarray(np.exp(self.log_probs_NK).sum(axis=1))


def largest_probabilities(
    profile: AnyProfile, arrays: Arrays, tables: Arrays, input_ids_N: np.ndarray, count: int
) -> Iterator[list[tuple[int, float]]]:
    """For every position the `count` largest probabilities that the cache knows, as (id, p at tau_dump), descending.

    `arrays` (N, ..) are those of a WindowBatch; `tables` those of the profile, by their own names. Of draws it is their
    shares.
    """
    ids_NK, probs_NK = _probabilities(profile, arrays, tables, input_ids_N)
    for ids_K, probs_K in zip(ids_NK, probs_NK, strict=True):
        order = np.argsort(-probs_K, kind="stable")[:count]
        yield [(int(ids_K[k]), float(probs_K[k])) for k in order if probs_K[k] > 0]


def _probabilities(
    profile: AnyProfile, arrays: Arrays, tables: Arrays, input_ids_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(ids_NK, probs_NK); an entry of no probability is not there."""
    match profile:
        case PlainTopKProfile() | TopKProfile():
            head = Head.of(arrays)
            return head.ids_NK, np.exp(head.log_probs_NK)
        case SampledProfile():
            is_there_NK = np.arange(profile.draws) < arrays["draw_unique"][:, None]
            return arrays["draw_ids"], np.where(is_there_NK, arrays["draw_counts"] / profile.draws, 0.0)
        case TransformProfile():
            probs_NV = _transformed(profile, arrays, tables, input_ids_N)
        case DenseProfile():
            final_ND = arrays["final"].astype(np.float32) * arrays["final_scale"].astype(np.float32)[:, None]
            probs_NV = _softmax(final_ND @ tables["output_matrix"].T, profile.temperature)
    return np.broadcast_to(np.arange(probs_NV.shape[1]), probs_NV.shape), probs_NV


def _transformed(profile: TransformProfile, arrays: Arrays, tables: Arrays, input_ids_N: np.ndarray) -> np.ndarray:
    """probs_NV: the head as stored, and the tail's mass shared out as the reconstructed logits say."""
    steps_NS = tables["table"][input_ids_N].astype(np.float32) / TABLE_UNITS_PER_STEP
    steps_NS[:, : profile.rank] += arrays["coefficients"].astype(np.float32)
    basis_SV = tables["basis"].astype(np.float32) * (tables["basis_scale"][:, None] * np.float32(profile.step))
    logits_NV = tables["mean"] + steps_NS @ basis_SV
    head = Head.of(arrays)
    rows_E, places_E = np.nonzero(np.isfinite(head.log_probs_NK))
    ids_E = head.ids_NK[rows_E, places_E]
    logits_NV[rows_E, ids_E] = -np.inf
    probs_NV = np.asarray(_softmax(logits_NV, profile.temperature) * np.exp(head.tail_N)[:, None])
    probs_NV[rows_E, ids_E] = np.exp(head.log_probs_NK[rows_E, places_E])
    return probs_NV


def _softmax(logits_NV: np.ndarray, temperature: float) -> np.ndarray:
    scaled_NV = logits_NV.astype(np.float64) / temperature
    scaled_NV -= scaled_NV.max(axis=1, keepdims=True)
    np.exp(scaled_NV, out=scaled_NV)
    return np.asarray(scaled_NV / scaled_NV.sum(axis=1, keepdims=True))


def _logsumexp(logits_NK: np.ndarray) -> np.ndarray:
    largest_N = logits_NK.max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        sums_N = np.log(np.exp(logits_NK - largest_N[:, None]).sum(axis=1))
    return np.where(np.isfinite(largest_N), largest_N + sums_N, -np.inf)
