"""The Karhunen-Loeve transform of a teacher's logits, fitted on calibration positions.

The logits of a position are W h, up to a constant that no softmax sees, so they live in the space of the centred output
matrix; all of it happens in D dimensions, through the Gram matrix of W, and V enters linearly.

Logits are compared by a weighted mean square over the vocabulary, the weight of an id being the mean of 1/V and its
mean probability: an error in an id that is never likely matters less, at temperature 1, than in one that often is.

Shapes: N positions, V vocabulary, D width, R coded coefficients, S basis vectors.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tristill.cache.profiles.transform import TABLE_UNITS_PER_STEP, TransformProfile
from tristill.stages.dump.config import TransformSettings

_SHRINKAGE_POSITIONS = 4
"""A token's mean counts as if it had this many more positions, all of them at zero."""
_BASIS_UNITS_PER_STEP = 64
_TABLED_ABOVE_STEPS = 0.01
_SMALLEST_EIGENVALUE = 1e-12


@dataclass(frozen=True)
class LogitTransform:
    """h -> coefficients c = (h - mean_D) @ encoder_DD, logits = mean_V + c @ basis_DV; float32.

    table_VD: mean coefficients of the positions of every input id. deviation_D: root mean square of what the table
    leaves over. spread_D: that of the table's own entries over positions. In nats: every basis vector has weighted
    norm 1.
    """

    mean_D: Tensor
    encoder_DD: Tensor
    mean_V: Tensor
    basis_DV: Tensor
    table_VD: Tensor
    deviation_D: Tensor
    spread_D: Tensor

    def at(self, settings: TransformSettings) -> tuple[TransformProfile, dict[str, np.ndarray]]:
        """The profile and its tables, without those of the head, for one setting."""
        limit = np.iinfo(np.int16).max
        table_VD = self.table_VD * (TABLE_UNITS_PER_STEP / settings.step)
        is_coded_D = self.deviation_D > settings.coded_above * settings.step
        is_coded_D |= table_VD.abs().amax(dim=0) > limit  # what the table does not hold
        is_coded_D[0] = True
        is_tabled_D = (self.spread_D > _TABLED_ABOVE_STEPS * settings.step) & ~is_coded_D
        coded, tabled = torch.nonzero(is_coded_D)[:, 0], torch.nonzero(is_tabled_D)[:, 0]
        kept_S = torch.cat([coded, tabled])
        amplitude_S = (self.deviation_D[kept_S].square() + self.spread_D[kept_S].square()).sqrt().clamp(min=1e-6)
        basis_scale_S = settings.step / _BASIS_UNITS_PER_STEP / amplitude_S
        basis_scale_S = torch.maximum(basis_scale_S, self.basis_DV[kept_S].abs().amax(dim=1) / limit)
        basis_SV = (self.basis_DV[kept_S] / basis_scale_S[:, None]).round().clamp(-limit, limit)
        table_VS = table_VD[:, kept_S].round().clamp(-limit, limit)
        profile = TransformProfile(
            step=settings.step,
            width=len(self.mean_D),
            rank=len(coded),
            basis_rank=len(kept_S),
            head=settings.head,
            temperatures=settings.temperatures,
            dither=settings.dither,
            seed=settings.seed,
        )
        tables = {
            "mean": self.mean_V,
            "basis": basis_SV.to(torch.int16),
            "basis_scale": basis_scale_S,
            "table": table_VS.to(torch.int16),
            "encoder": self.encoder_DD[:, coded] / settings.step,
            "encoder_mean": self.mean_D,
        }
        return profile, {name: table.cpu().numpy() for name, table in tables.items()}


def fit_transform(final_ND: Tensor, input_ids_N: Tensor, head_VD: Tensor, mean_p_V: Tensor) -> LogitTransform:
    """The transform of final hidden states (N, D) at input ids (N,), for the output matrix `head_VD`; in float64.

    `mean_p_V` is the teacher's mean distribution.
    """
    vocab_size = len(head_VD)
    weights_V = (0.5 / vocab_size + 0.5 * mean_p_V.double()).clamp(min=0)
    weights_V /= weights_V.sum()
    final_ND, head_VD = final_ND.double(), head_VD.double()
    centred_VD = head_VD - weights_V @ head_VD
    mean_D = final_ND.mean(dim=0)
    counts_V = torch.bincount(input_ids_N, minlength=vocab_size).double()
    sums_VD = torch.zeros(vocab_size, final_ND.shape[1], dtype=torch.float64, device=final_ND.device)
    sums_VD.index_add_(0, input_ids_N, final_ND - mean_D)
    table_VD = sums_VD / (counts_V + _SHRINKAGE_POSITIONS)[:, None]
    rest_ND = final_ND - mean_D - table_VD[input_ids_N]
    gram_DD = centred_VD.T @ (weights_V[:, None] * centred_VD)
    eigenvalues, vectors = torch.linalg.eigh(gram_DD)
    roots = eigenvalues.clamp(min=_SMALLEST_EIGENVALUE * float(eigenvalues.max())).sqrt()
    root_DD = (vectors * roots) @ vectors.T
    inverse_root_DD = (vectors / roots) @ vectors.T
    variances_D, rotation_DD = torch.linalg.eigh(root_DD @ (rest_ND.T @ rest_ND / len(rest_ND)) @ root_DD)
    variances_D, rotation_DD = variances_D.flip(0), rotation_DD.flip(1)
    encoder_DD = root_DD @ rotation_DD
    table_VD = table_VD @ encoder_DD
    shares_V = counts_V / counts_V.sum()
    return LogitTransform(
        mean_D=mean_D.float(),
        encoder_DD=encoder_DD.float(),
        mean_V=(centred_VD @ mean_D).float(),
        basis_DV=(centred_VD @ (inverse_root_DD @ rotation_DD)).T.float(),
        table_VD=table_VD.float(),
        deviation_D=variances_D.clamp(min=0).sqrt().float(),
        spread_D=(shares_V @ table_VD.square()).sqrt().float(),
    )
