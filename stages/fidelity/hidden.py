"""What storing hidden states costs a loss that compares them.

Shapes: N positions, D width.
"""

from dataclasses import dataclass

from torch import Tensor

from tristill.stages.fidelity.measure import compare


@dataclass(frozen=True)
class HiddenFidelity:
    """relative_error: mean over positions of |stored - true| / |true|.

    angle_deg, norm_ratio: of the mean gradients, from stored and from true states, of the mean squared error in its
    projection, where that is the identity.
    """

    relative_error: float
    angle_deg: float
    norm_ratio: float


def hidden_fidelity(student_ND: Tensor, true_ND: Tensor, stored_ND: Tensor) -> HiddenFidelity:
    """For the states of one layer, and those of a student of equal width at the same positions."""
    student_ND, true_ND, stored_ND = student_ND.double(), true_ND.double(), stored_ND.double()
    angle_deg, norm_ratio = compare((student_ND - stored_ND).T @ student_ND, (student_ND - true_ND).T @ student_ND)
    return HiddenFidelity(relative_error(true_ND, stored_ND), angle_deg, norm_ratio)


def relative_error(true_ND: Tensor, stored_ND: Tensor) -> float:
    """Mean over positions of |stored - true| / |true|."""
    return float(((stored_ND - true_ND).norm(dim=1) / true_ND.norm(dim=1).clamp(min=1e-30)).mean())
